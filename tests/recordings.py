"""What stands in for a CUDA graph where there is no GPU."""

from dgemma_accel import cuda_graph


class Again:
    """Runs the function again; warms up as the CUDA graph does, which leaves its marks in the static tensors."""

    bytes = 1000
    made: list = []

    def __init__(self, function, device, pool):
        self.function, self.pool, self.replays, self.runs, self.waits = function, pool, 0, 0, 0
        for _ in range(cuda_graph.WARM_UP):
            function()
        Again.made.append(self)

    @staticmethod
    def make_pool(device, *, products=True):
        return object()

    def begin(self):
        self.runs += 1

    def replay(self):
        self.replays += 1
        self.function()

    def end(self):
        self.runs -= 1

    def wait(self):
        assert not self.runs
        self.waits += 1
