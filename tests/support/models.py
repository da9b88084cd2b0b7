"""Tiny models with random weights for engine tests, made on the spot."""

from pathlib import Path

import torch

VOCABULARY = 512


def tokenizer():
    """One token per printable ASCII byte, the rest of 512 ids are words `<i>`: any text can be encoded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = [AddedToken(f"<{i}>", special=False, normalized=False) for i in range(len(vocabulary), VOCABULARY - 2)]
    inner.add_tokens(words)
    inner.add_special_tokens(["<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
    )


# Scales of a model whose metrics half precision moves little: those of the default, peaked one it moves by a tenth of a bit.
MILD = {"query_key_scale": 1.5, "logits_scale": 2.0}


def tiny_llama(folder: Path, **options) -> Path:
    """A small Llama; see :func:`tiny_model`."""
    return tiny_model(folder, "Llama", **options)


def tiny_model(
    folder: Path, family: str, *, layers: int = 2, query_key_scale: float = 5.0, logits_scale: float = 6.0, **config
) -> Path:
    """A small model with random weights, saved in float32.

    Args:
        folder: where to save it.
        family: what transformers' classes of it begin with, like Llama or Gemma2.
        layers: number of layers.
        query_key_scale: factor on query and key weights. Without it attention is almost uniform, its entropy is ln n for any
            text, and comparing entropies proves nothing.
        logits_scale: factor on the LM head, so that next-token distributions aren't flat either.
        config: of the family's configuration class.
    """
    import transformers

    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        **config,
    }
    described = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, num_hidden_layers=layers, **settings)
    model = getattr(transformers, f"{family}ForCausalLM")(described).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)  # the default initialisation leaves every layer near the identity
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(query_key_scale)
        model.lm_head.weight.mul_(logits_scale)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
