"""The loop over the steps of a canvas: what would make the host wait for the device, and running ahead of it."""

import functools
import importlib

import pytest
import torch
from hf_models import CANVAS, Drafts, generate, generation, prompt, tiny_model
from recordings import Crossings, record_on_a_cpu
from torch.utils._python_dispatch import TorchDispatchMode

import dgemma_accel
from dgemma_accel.hf import call, capture, denoising, graph, lookout, masks
from dgemma_accel.hf.products import side_by_side

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class Waits(TorchDispatchMode):
    """Operations that need values on the host: on a GPU each of them stops it until the device is done."""

    READS = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "unique",
        "multinomial",
    )

    def __init__(self):
        super().__init__()
        self.seen, self.operations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.operations += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        lengths = (
            name == "repeat_interleave"
            and isinstance(args[0], torch.Tensor)
            and "output_size" not in (kwargs or {})
        )
        if by_mask or lengths or any(name.startswith(read) for read in self.READS):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_no_step_waits_for_the_device(model, monkeypatch, batch, cache):
    traces = []
    run = denoising.Denoiser.run

    def watched(self, *state):
        with Waits() as waits:
            result = run(self, *state)
        traces.append(waits)
        return result

    monkeypatch.setattr(denoising.Denoiser, "run", watched)
    ids, mask = prompt(batch, 20, left_padding=(4,))
    recorder = Drafts()
    with dgemma_accel.accelerated(model):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=3 * CANVAS, seed=1, streamer=recorder,
            return_confidence=True, cache_implementation=cache,
        )  # fmt: skip
    assert len(traces) == 3 and len(recorder.values) > 6
    assert [trace.seen for trace in traces] == [[], [], []]
    assert all(trace.operations > 100 for trace in traces)


def test_pinned_positions_do_not_wait_either(model, monkeypatch):
    run, traces = denoising.Denoiser.run, []

    def watched(self, *state):
        with Waits() as waits:
            result = run(self, *state)
        traces.append(waits.seen)
        return result

    monkeypatch.setattr(denoising.Denoiser, "run", watched)
    ids, _ = prompt(2, 9)
    canvas, _ = prompt(2, CANVAS, seed=4)
    with dgemma_accel.accelerated(model):
        model.generate(ids, decoder_input_ids=canvas, pinned=[1, 2], max_new_tokens=CANVAS)
    assert traces == [[]]


class TestMasksOfTheDevice:
    """`generate` makes its masks longer by what is always seen, so only the prompt's are read."""

    @pytest.fixture
    def reads(self, monkeypatch):
        """Masks of a CPU count as a device's; those that were read."""
        found, right = [], call.Call.mask_on_host

        def watched(self, mask):
            host = right(self, mask)
            if host is None:
                found.append(tuple(mask.shape))
            return host

        monkeypatch.setattr(masks, "_is_on_host", lambda mask: False)
        monkeypatch.setattr(call.Call, "mask_on_host", watched)
        return found

    @pytest.mark.parametrize("padding", [(), (0, 4), (7, 2)])
    def test_they_are_read_once(self, model, reads, padding):
        ids, mask = prompt(2, 9, left_padding=padding)
        expected = generate(model, ids, mask, max_new_tokens=4 * CANVAS)
        assert not reads
        with dgemma_accel.accelerated(model):
            result = generate(model, ids, mask, max_new_tokens=4 * CANVAS)
        assert reads == [(2, 9), (2, 9 + CANVAS)]
        assert torch.equal(result.sequences, expected.sequences)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_what_was_written_since_is_read(self, model, reads, mode):
        """A mask of bools is not copied by `generate`: its caller may write it while a canvas is drafted. Where no
        writes are counted, that of the caller is read again."""

        class Writes(Drafts):
            def put_draft(self, value):
                if not self.values:
                    self.mask[1, :5] = False
                self.values.append(value.clone())

        def run():
            ids, mask = prompt(2, 9)
            streamer = Writes()
            streamer.mask = mask.bool()
            options = {"max_new_tokens": 3 * CANVAS, "streamer": streamer}
            return generate(model, ids, streamer.mask, **options).sequences

        with mode():
            expected = run()
            with dgemma_accel.accelerated(model):
                assert torch.equal(run(), expected)
        assert reads[:4] == [(2, 9), (2, 9 + CANVAS), (2, 9), (2, 9 + CANVAS)] and len(reads) <= 6


def traced_on_the_host(function, *arguments):
    """What a trace of `function` would make on the host; what it reads that is there already does not count."""
    made = []

    def backend(module, inputs):
        for node in module.graph.nodes:
            value = node.meta.get("example_value")
            if node.op != "placeholder" and isinstance(value, torch.Tensor) and not value.is_meta:
                made.append(str(node.target))
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*arguments)
    return made


@pytest.mark.parametrize("pinned, depth", [(False, 1), (True, 1), (False, None)])
def test_a_step_copies_nothing_from_the_host(pinned, depth):
    model, batch = tiny_model(torch.bfloat16).to("meta"), 2

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    canvas = [empty(batch, CANVAS, dtype=torch.int64) for _ in range(2)]
    state = graph.State(
        *canvas,
        history=empty(depth or 0, batch, CANVAS, dtype=torch.int64),
        finished=empty(batch, dtype=torch.bool),
        soft=empty(batch, CANVAS, 64),
        confidence=empty(batch, CANVAS, dtype=torch.float32),
        entropy=empty(batch, CANVAS, dtype=torch.float32),
        steps=empty(batch, dtype=torch.int64),
    )
    buffers, prefixes = [], {}
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        buffers.append(
            empty(batch, attention.k_proj.out_features // attention.head_dim, 40, attention.head_dim)
        )
        rotary = [empty(1, CANVAS, attention.head_dim) for _ in range(2)]
        bounds = [empty(batch, dtype=torch.int32) for _ in range(2)]
        prefixes[attention.layer_type] = graph.Prefix(*bounds, *rotary)
    in_place = graph.InPlace(
        buffers, buffers, side_by_side(model.model.decoder.layers, "auto", torch.bfloat16)
    )
    whole, fraction = empty(dtype=torch.int64), empty(dtype=torch.float32)
    numbers = graph.Numbers(whole, whole, fraction, fraction, fraction)
    given = empty(batch, CANVAS, dtype=torch.bool) if pinned else None
    settings = graph.Settings(30.0, model.config.text_config.vocab_size, depth, False, ("auto",) * 4)
    with torch.no_grad(), Crossings() as crossings:
        decision = graph.decide(model, state, in_place, prefixes, numbers, given, settings)
        last = state.finished, state.soft, numbers.temperature, given, settings
        after = decision.state(graph.condition(model, decision, *last))
    assert crossings.seen == [] and crossings.operations > 100
    assert all(tensor.is_meta for tensor in after)
    with torch.no_grad():
        arguments = (model, state, in_place, prefixes, numbers, given, settings)
        assert traced_on_the_host(graph.decide, *arguments) == []
        assert traced_on_the_host(graph.condition, model, decision, *last) == []
        assert traced_on_the_host(lambda x: x + torch.tensor(1), whole) != []
    with Crossings() as crossings:
        torch.tensor(0.5).to("meta")
        whole + torch.tensor(1)
    assert crossings.seen == ["_to_copy", "add"]


def test_the_original_s_step_waits(model):
    """The same trace on the original finds what it is meant to find."""
    seen = []
    step = generation.DiffusionGemmaGenerationMixin._denoising_step

    def watched(**kwargs):
        with Waits() as waits:
            result = step(model, **kwargs)
        seen.append(waits.seen)
        return result

    model.__dict__["_denoising_step"] = watched
    try:
        model.generate(prompt(1, 9)[0], max_new_tokens=CANVAS)
    finally:
        del model.__dict__["_denoising_step"]
    # Two more come of validating the distributions, which torch.compile turns off for the process.
    assert all(names for names in seen)


class Late:
    """A copy that is only ready when somebody waits for it, as on a device that is far behind."""

    def __init__(self, tensors):
        # What the device holds at that moment.
        self.tensors = [tensor.clone() for tensor in tensors]

    def ready(self):
        return False

    def wait(self):
        return self.tensors


@pytest.mark.parametrize("batch", [1, 3])
def test_running_ahead_changes_nothing(model, monkeypatch, batch):
    ids, mask = prompt(batch, 20, left_padding=(4,))
    step, steps = denoising.Denoiser.step, []
    monkeypatch.setattr(
        denoising.Denoiser, "step", lambda self, *state: (steps.append(1), step(self, *state))[1]
    )

    def run():
        steps.clear()
        recorder = Drafts()
        options = {"return_confidence": True, "return_steps": True, "max_new_tokens": 3 * CANVAS}
        return generate(model, ids, mask, streamer=recorder, **options), recorder.values, len(steps)

    with dgemma_accel.accelerated(model):
        at_once, drafts, count = run()
        monkeypatch.setattr(lookout, "copy_of", Late)
        late, late_drafts, late_count = run()
    assert late_count > count, "nothing ran ahead"
    assert late_count <= count + 3 * denoising.AHEAD
    assert torch.equal(late.sequences, at_once.sequences) and torch.equal(late.steps, at_once.steps)
    assert torch.equal(late.confidence, at_once.confidence) and torch.equal(late.entropy, at_once.entropy)
    assert torch.equal(late.tokens_per_forward, at_once.tokens_per_forward)
    assert len(late_drafts) == len(drafts) and all(torch.equal(a, b) for a, b in zip(late_drafts, drafts))
    assert torch.equal(generate(model, ids, mask, max_new_tokens=3 * CANVAS).sequences, late.sequences)


def test_no_captured_step_runs_past_the_end(model, monkeypatch):
    """The host has to wait for each decision here, and for none of the second halves."""
    ids, mask = prompt(2, 20, left_padding=(4,))
    order, half = [], capture.CapturedStep.condition

    class Waited(Late):
        def wait(self):
            order.append("known")
            return self.tensors

    record_on_a_cpu(monkeypatch)
    monkeypatch.setattr(lookout, "copy_of", Waited)
    monkeypatch.setattr(
        capture.CapturedStep, "condition", lambda self: (order.append("second"), half(self))[1]
    )
    options = {"return_steps": True, "max_new_tokens": 3 * CANVAS}
    with dgemma_accel.accelerated(model, graph=True):
        result = generate(model, ids, mask, **options)
        (report,) = (one for one in dgemma_accel.captures(model) if one.what == "step")
    # As many as the row took that was finished last.
    taken = int(result.steps.max(0).values.sum())
    assert report.replays == taken and order == ["second", "known"] * taken
    assert taken < 3 * model.generation_config.max_denoising_steps
    with dgemma_accel.accelerated(model):
        assert torch.equal(generate(model, ids, mask, **options).sequences, result.sequences)


@pytest.mark.parametrize("finishes", [True, False])
def test_a_streamer_has_its_draft_while_the_next_step_is_under_way(model, monkeypatch, finishes):
    ids, _ = prompt(1, 20)
    order, halves = [], (capture.CapturedStep.decide, capture.CapturedStep.condition)

    class Streamer(Drafts):
        def put_draft(self, value):
            order.append("draft")
            super().put_draft(value)

    record_on_a_cpu(monkeypatch)
    monkeypatch.setattr(lookout, "copy_of", Late)
    for half in halves:
        noted = functools.wraps(half)(lambda self, half=half: (order.append(half.__name__), half(self))[1])
        monkeypatch.setattr(capture.CapturedStep, half.__name__, noted)
    if not finishes:
        monkeypatch.setattr(type(model), "_prepare_diffusion_stopping_criteria", lambda self, config: None)
    first, second = Streamer(), Drafts()
    options = {"max_new_tokens": CANVAS, "max_denoising_steps": 5}
    with dgemma_accel.accelerated(model, graph=True):
        result = generate(model, ids, streamer=first, **options)
    with dgemma_accel.accelerated(model):
        assert torch.equal(generate(model, ids, streamer=second, **options).sequences, result.sequences)
    steps = len(first.values)
    expected = ["decide", "condition", *["decide", "condition", "draft"] * (steps - 1), "draft"]
    assert order == expected and steps > 2
    assert len(second.values) == steps and all(map(torch.equal, first.values, second.values))


def test_a_streamer_waits_for_no_other_step_where_steps_are_over_at_once(model, monkeypatch):
    """On a CPU, where the next step would keep it waiting."""
    order, step = [], denoising.Denoiser.step

    class Streamer(Drafts):
        def put_draft(self, value):
            order.append("draft")

    monkeypatch.setattr(
        denoising.Denoiser, "step", lambda self, *state: (order.append("step"), step(self, *state))[1]
    )
    with dgemma_accel.accelerated(model):
        generate(model, prompt(1, 20)[0], streamer=Streamer(), max_new_tokens=CANVAS)
    assert order == ["step", "draft"] * (len(order) // 2) and len(order) > 4


def test_a_canvas_without_stopping_criterion(model, monkeypatch):
    """Nothing to look out for: no copies, all steps."""
    copies = []
    monkeypatch.setattr(lookout, "copy_of", lambda tensors: copies.append(1))
    monkeypatch.setitem(vars(model), "_prepare_diffusion_stopping_criteria", lambda generation_config: None)
    ids, _ = prompt(2, 9)
    expected = generate(model, ids)
    with dgemma_accel.accelerated(model):
        result = generate(model, ids, return_steps=True)
    assert torch.equal(result.sequences, expected.sequences) and (result.steps == 8).all() and not copies
    assert torch.equal(result.tokens_per_forward, expected.tokens_per_forward)


def test_generate_of_the_class(model):
    """Without the patched `generate` around it a call takes one step, as the caller's loop expects."""
    ids, _ = prompt(2, 9)
    first, second = Drafts(), Drafts()
    expected = generate(model, ids, max_new_tokens=CANVAS, streamer=first)
    with dgemma_accel.accelerated(model):
        patched = vars(model).pop("generate")
        try:
            result = generate(model, ids, max_new_tokens=CANVAS, streamer=second)
        finally:
            vars(model)["generate"] = patched
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.tokens_per_forward, expected.tokens_per_forward)
    assert len(first.values) == len(second.values) > 2
    assert all(torch.equal(a, b) for a, b in zip(first.values, second.values))


@pytest.mark.gpu
def test_no_synchronisation_on_the_gpu(monkeypatch):
    model = dgemma_accel.accelerate(tiny_model().cuda())
    ids = prompt(2, 20)[0].cuda()
    model.generate(ids, seed=1)
    run = denoising.Denoiser.run

    def watched(self, *state):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, *state)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(denoising.Denoiser, "run", watched)
    recorder = Drafts()
    model.generate(ids, seed=1, streamer=recorder)
    assert len(recorder.values) > 2


@pytest.mark.gpu
def test_nothing_of_ours_waits_between_canvases(monkeypatch):
    """From the second canvas on: masks, the pass that stores the last canvas, and the steps."""
    watching, accelerating = [], importlib.import_module("dgemma_accel.hf.accelerate")

    def watched(right):
        @functools.wraps(right)
        def run(*arguments, **options):
            if not (watching and call.active_call().canvases_begun):
                return right(*arguments, **options)
            watching.append(right.__name__)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return right(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    for name in (
        "create_encoder_masks",
        "create_decoder_masks",
        "text_encoder_forward",
        "next_canvas_arguments",
    ):
        monkeypatch.setattr(accelerating, name, watched(getattr(accelerating, name)))
    monkeypatch.setattr(denoising.Denoiser, "run", watched(denoising.Denoiser.run))
    model = dgemma_accel.accelerate(tiny_model().cuda())
    ids, mask = (x.cuda() for x in prompt(2, 20, left_padding=(0, 3)))
    options = {"attention_mask": mask, "max_new_tokens": 4 * CANVAS, "eos_token_id": None, "seed": 1}
    expected = model.generate(ids, **options).sequences
    watching.append("on")
    assert torch.equal(model.generate(ids, **options).sequences, expected)
    names = (
        "text_encoder_forward",
        "create_encoder_masks",
        "create_decoder_masks",
        "next_canvas_arguments",
        "run",
    )
    assert [watching.count(name) for name in names] == [3, 3, 3, 4, 4]
