"""From a GGUF file to a folder that vLLM and transformers load: bfloat16 weights, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

from tools.real_models.catalogue import RealModel
from tools.real_models.fetch import ModelError

# transformers reads GGUF files with the last two.
_NEEDED = ("torch", "transformers", "accelerate", "gguf")


def convert(model: RealModel, gguf: Path, folder: Path) -> None:
    """Write the model's folder, whole or not at all.

    The weights were quantised to four bits when they were packed; they are dequantised, not restored.

    Args:
        model: which.
        gguf: its weights.
        folder: where it goes; must not exist.

    Raises:
        ModelError: a package that the conversion needs isn't installed.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ModelError(f"converting needs more packages; install them with pip install {' '.join(missing)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    weights = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).to(torch.bfloat16)
    # transformers refuses to save what it loaded as quantised, though the weights aren't any more.
    del weights.config.quantization_config
    weights.hf_quantizer, weights.is_quantized = None, False
    weights.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if model.begin_token is not None:
        _begin_with(partial / "tokenizer.json", model.begin_token)
    partial.replace(folder)


def _begin_with(file: Path, token: str) -> None:
    """Let a tokenizer put a token in front of every text."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    [number] = [added["id"] for added in settings["added_tokens"] if added["content"] == token]
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
