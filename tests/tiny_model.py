"""A Hugging Face model directory of 287k random weights, with a tokenizer that llama.cpp's converter accepts."""

import json
import random
from pathlib import Path
from typing import Any

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = "the sea sky a boat wave wind and rain is cold it was warm we go far they come near"


def words(count: int, seed: int = 0) -> str:
    """Text that the tokenizer was trained on."""
    chosen = random.Random(seed)
    return " ".join(chosen.choice(TEXT.split()) for _ in range(count))


def make(folder: Path, family: str = "Llama", byte_level: bool = False, vectors: float = 0.0, **config: object) -> Path:
    """Write the model; `config` changes entries of its `family`'s configuration. `byte_level`: a tokenizer as GPT-2's,
    which llama.cpp's converter takes only where it knows it. `vectors`: standard deviation of what biases and norms
    differ by from 0 and 1."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    size = _make_byte_level_tokenizer(folder) if byte_level else _make_tokenizer(folder)
    settings = {
        "vocab_size": size,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{family}Config")(**(settings | config))
    model = transformers.AutoModelForCausalLM.from_config(configuration)
    for parameter in model.parameters():
        if vectors and parameter.ndim == 1:
            parameter.data += vectors * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _make_tokenizer(folder: Path) -> int:
    """`tokenizer.model` for the converter, `tokenizer.json` for transformers; the size of the vocabulary."""
    import sentencepiece
    import tokenizers

    lines = (words(12, seed) for seed in range(400))
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(prefix),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    prefix.with_suffix(".vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(prefix) + ".model")
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = []
    for piece, i in vocabulary.items():  # a piece is made by joining two that are more frequent
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        if not pieces.is_byte(i) and not pieces.is_control(i) and not pieces.is_unknown(i):
            merges += sorted(
                (p for p in pairs if p[0] in vocabulary and p[1] in vocabulary), key=lambda p: vocabulary[p[0]]
            )
    bpe = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return _save(tokenizer, folder)


def inputs(model: Any, names: list[str], tokens: Any) -> dict[str, Any]:
    """What modules read [tokens, columns] in float64, by hooks on the whole model."""
    import torch

    found: dict[str, Any] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found.update({name: args[0].detach().flatten(0, 1).double().numpy()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


def _make_byte_level_tokenizer(folder: Path) -> int:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([words(4000)], trainer)
    return _save(tokenizer, folder)


def _save(tokenizer, folder: Path) -> int:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    return tokenizer.get_vocab_size()
