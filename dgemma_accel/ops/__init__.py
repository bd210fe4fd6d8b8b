"""The public ops: argument checks, registration as torch.ops.dgemma.<op>, dispatch to a backend."""
