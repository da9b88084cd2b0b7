"""From a GGUF file to a folder that vLLM and transformers load: bfloat16 weights, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.real_models.catalogue import RealModel
from tools.real_models.fetch import ModelError
from tools.real_models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_NEEDED = ("torch", "transformers", "gguf")

# Where transformers gives the language model of a family another name than the file.
_MODEL_TYPES = {"gemma3": "gemma3_text"}


def convert(model: RealModel, gguf: Path, folder: Path) -> None:
    """Write the model's folder, whole or not at all.

    The weights were quantised to four bits when they were packed; they are dequantised, not restored. The folder is the one
    that transformers' ``from_pretrained(..., gguf_file=...)`` and ``save_pretrained`` would write. They read the vocabulary
    several times over, and look every tensor's name up for each module: for most of a minute of these small models.

    Args:
        model: which.
        gguf: its weights.
        folder: where it goes; must not exist.

    Raises:
        ModelError: a package that the conversion needs isn't installed, or transformers has other weights than the file.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ModelError(f"converting needs more packages; install them with pip install {' '.join(missing)}")
    import torch
    from transformers import TOKENIZER_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    file = GGUFFile(gguf)
    config = _configuration(file)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights.load_state_dict(_weights(file, weights), strict=False, assign=True)
    weights.tie_weights()
    empty = [name for name, parameter in weights.named_parameters() if parameter.is_meta]
    if empty:
        raise ModelError(
            f"{model.name} has no {empty[0]}, which this transformers wants; install that of requirements/cpu.lock"
        )
    weights.save_pretrained(partial)
    # As AutoTokenizer chooses, which reads the whole file for it.
    tokenizer = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    tokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(partial)
    if model.begin_token is not None:
        _begin_with(partial / "tokenizer.json", model.begin_token)
    partial.replace(folder)


def _configuration(file: GGUFFile) -> PreTrainedConfig:
    """What transformers calls the settings of the file."""
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    settings: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in file.tensors}
    for key, value in file.metadata.items():
        group, _, name = key.partition(".")
        renamed = GGUF_CONFIG_MAPPING.get(group, {}).get(name)
        if isinstance(renamed, str):
            settings[renamed] = value
    settings.setdefault("vocab_size", file.metadata["tokenizer.ggml.tokens"])
    model_type = settings.pop("model_type")
    return AutoConfig.for_model(_MODEL_TYPES.get(model_type, model_type), **settings)


def _weights(file: GGUFFile, model: PreTrainedModel) -> dict[str, Tensor]:
    """The file's weights in bfloat16, one dequantised after the other, under the names that the model has for them."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = file.metadata["general.architecture"]
    [known] = [number for number, name in MODEL_ARCH_NAMES.items() if name == architecture]
    names = get_tensor_name_map(known, model.config.num_hidden_layers)
    # Undoes what llama.cpp changes of some: it permutes rows, and adds 1 to norms.
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    weights = {}
    for name in model.state_dict():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored in file.tensors:
            values = processor.process(file.values(stored), stored).weights
            weights[name] = torch.from_numpy(np.require(values, requirements="W")).to(torch.bfloat16)
    return weights


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
