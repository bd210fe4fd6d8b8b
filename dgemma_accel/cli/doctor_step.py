"""`doctor --step`: compile and capture the step of a small random model, and say what that takes here."""

from __future__ import annotations

import dataclasses

import torch

TEXT = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "global_head_dim": 128, "num_global_key_value_heads": 1, "sliding_window": 64, "num_experts": 8,
    "top_k_experts": 2, "moe_intermediate_size": 64, "max_position_embeddings": 4096, "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision", "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64,
    "max_position_embeddings": 512,
}  # fmt: skip


def examine_step() -> dict:
    """{"device", "error"} and, where the step ran, the fields of its `CaptureReport` and, as "storing", those of the
    pass over a finished canvas (None without a GPU); errors are told, not raised."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict = {"device": device.type, "error": None}
    try:
        with torch.random.fork_rng():
            found |= _compiled_and_captured(device)
    except Exception as error:
        lines = str(error).strip().splitlines()
        found["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return found


def _compiled_and_captured(device: torch.device) -> dict:
    import transformers

    from ..hf import accelerated, captures
    from ..hf.patches import acceleration_of
    from ..hf.registry import STEP, STORING

    top = TEXT["vocab_size"]
    config = transformers.DiffusionGemmaConfig(
        text_config=transformers.DiffusionGemmaTextConfig(**TEXT),
        vision_config=transformers.Gemma4VisionConfig(**VISION),
        boi_token_id=top - 1, eoi_token_id=top - 2, image_token_id=top - 3, canvas_length=32,
    )  # fmt: skip
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    prompt = torch.full((1, 8), 5, device=device)
    with accelerated(model, graph=True):
        # Two canvases without an end token, so that the first one is stored.
        model.generate(prompt, max_new_tokens=64, max_denoising_steps=4, eos_token_id=None, seed=0)
        reports = {report.what: dataclasses.asdict(report) for report in captures(model)}
        said = " ".join(sorted(acceleration_of(model).said))
    if STEP not in reports:
        raise RuntimeError(f"no step was compiled: {said}")
    stored = reports.get(STORING)
    if stored is None and device.type == "cuda":
        stored = {"captured": False, "problem": said}
    return reports[STEP] | {"storing": stored}


def lines_of(found: dict) -> list[str]:
    """For people: what `examine_step` found."""
    where = f"step       a small random model on {found['device']}"
    if found["error"] is not None:
        return [f"{where}: failed: {found['error']}"]
    if found["compiled"]:
        compiled = f"compiled in {found['compile_seconds']:.1f} s with its first run"
    else:
        compiled = f"runs uncompiled, {found['problem']}"
    if found["captured"]:
        captured = f"captured in {found['capture_seconds']:.1f} s, {found['memory_bytes'] / 2**20:.1f} MiB"
    elif found["device"] == "cpu":
        captured = "no CUDA"
    else:
        captured = found["problem"] or "no"
    lines = [f"{where}: {compiled}", f"capture    {captured}"]
    stored = found.get("storing")
    if stored is not None:
        cost = f"captured in {stored['capture_seconds']:.1f} s, {stored['memory_bytes'] / 2**20:.1f} MiB"
        lines.append(f"storing    a finished canvas: {cost if stored['captured'] else stored['problem']}")
    return lines
