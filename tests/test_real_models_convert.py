"""Conversion of GGUF files, held to what transformers itself reads from them, on models of two layers with drawn weights."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from tools.real_models.catalogue import MODELS
from tools.real_models.convert import convert
from tools.real_models.fetch import ModelError
from tools.real_models.gguf_file import GGUFFile

SIZE, HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
HEAD = SIZE // HEADS
MATRICES = {
    "attn_q": (SIZE, SIZE),
    "attn_k": (KV_HEADS * HEAD, SIZE),
    "attn_v": (KV_HEADS * HEAD, SIZE),
    "attn_output": (SIZE, SIZE),
    "ffn_gate": (HIDDEN, SIZE),
    "ffn_up": (HIDDEN, SIZE),
    "ffn_down": (SIZE, HIDDEN),
}
NORMS = {
    "llama": {"attn_norm": SIZE, "ffn_norm": SIZE},
    "gemma3": {
        "attn_norm": SIZE,
        "ffn_norm": SIZE,
        "post_attention_norm": SIZE,
        "post_ffw_norm": SIZE,
        "attn_q_norm": HEAD,
        "attn_k_norm": HEAD,
    },
}
KINDS = (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0)
WORDS = [*"thequickbrownfx", "th", "the", "▁", "▁the", "qu", "ck", "ow"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TEXT = "the quick brown fox<eos> the"


def written(path, architecture):
    """A file as llama.cpp would write it; draws its weights."""
    draw = np.random.default_rng(0)
    tokens = [*SPECIAL, *dict.fromkeys(word.replace("▁", "Ġ") if architecture == "llama" else word for word in WORDS)]
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    if architecture == "gemma3":
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        writer.add_sliding_window(32)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    else:
        writer.add_rope_dimension_count(HEAD)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(["t h", "th e", "Ġ the", "q u", "c k", "o w"])
        writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    shapes = {"token_embd.weight": (len(tokens), SIZE), "output_norm.weight": (SIZE,)}
    for layer in range(LAYERS):
        shapes.update({f"blk.{layer}.{name}.weight": shape for name, shape in MATRICES.items()})
        shapes.update({f"blk.{layer}.{name}.weight": (size,) for name, size in NORMS[architecture].items()})
    for number, (name, shape) in enumerate(shapes.items()):
        values = draw.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = KINDS[number % len(KINDS)]
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=list(NORMS))
def file(request, tmp_path):
    return written(tmp_path / "tiny.gguf", request.param)


def model(**changes):
    return replace(MODELS["smollm2-135m"], name="tiny", **changes)


def test_values_are_those_of_ggufs_own_reader(file):
    ours, theirs = GGUFFile(file), gguf.GGUFReader(file)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.values(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))
    for key, value in ours.metadata.items():
        told = theirs.fields[key].contents()
        # Of arrays the number alone is read; a float of 32 bits comes back as it is stored.
        assert value == (len(told) if isinstance(told, list) else told), key


def test_a_folder_is_what_transformers_reads_from_the_file(file, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "tiny"
    convert(model(), file, folder)
    source = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": file.name}
    expected = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).to(torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert found.dtype == torch.bfloat16
    assert type(found) is type(expected)
    weights = found.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for name, values in expected.state_dict().items():
        assert torch.equal(weights[name], values), name
    theirs, ours = AutoConfig.from_pretrained(**source).to_dict(), AutoConfig.from_pretrained(folder).to_dict()
    differing = {name for name in theirs if theirs[name] != ours.get(name)}
    assert differing <= {"_name_or_path", "architectures", "dtype"}
    before, after = AutoTokenizer.from_pretrained(**source), AutoTokenizer.from_pretrained(folder)
    assert after(TEXT).input_ids == before(TEXT).input_ids
    assert after.decode(after(TEXT).input_ids) == before.decode(before(TEXT).input_ids)
    assert (after.chat_template, after.special_tokens_map) == (before.chat_template, before.special_tokens_map)


def test_prompts_begin_with_the_token_that_the_model_wants(tmp_path):
    from transformers import AutoTokenizer

    convert(model(begin_token="<bos>"), written(tmp_path / "tiny.gguf", "gemma3"), tmp_path / "tiny")
    numbers = AutoTokenizer.from_pretrained(tmp_path / "tiny")("the fox").input_ids
    assert numbers[0] == SPECIAL.index("<bos>")
    assert numbers.count(numbers[0]) == 1


def test_weights_that_the_file_hasnt_are_named(tmp_path, monkeypatch):
    file = written(tmp_path / "tiny.gguf", "llama")
    init = GGUFFile.__init__

    def without_one(self, path: Path):
        init(self, path)
        del self.tensors["blk.1.ffn_up.weight"]

    monkeypatch.setattr(GGUFFile, "__init__", without_one)
    with pytest.raises(ModelError, match=r"tiny has no model\.layers\.1\.mlp\.up_proj\.weight, which this transformers wants"):
        convert(model(), file, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
