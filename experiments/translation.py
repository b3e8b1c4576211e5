"""A Transformer that translates, on any parallel text: two files with one sentence a line, such as WMT's.

    python -m experiments.translation --data wmt/train --source en --target de --storage runs --epochs 10
    ray job submit --working-dir . -- python -m experiments.translation --data /shared/wmt/train --source en --target de \
        --storage /shared/runs --epochs 10 --batch-size 1024 --gpus 1 --compile

DATA.SOURCE and DATA.TARGET are the files. One byte-pair vocabulary for both is learned from them; sentences are padded to
--length tokens, so that all batches have one shape, and longer pairs are left out. Every 200th pair chooses learning rates.
Tokens and tokenizer are kept beside the files, in DATA.*.pt: `Tokenizer.from_str` of its "tokenizer". Base size of Vaswani
et al. 2017, with the norms first; Adam (.9, .98). The loss is per token, and smoothed, .1, where it is validated as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

import autolrs_ray
from autolrs_ray import TrainingTask
from experiments import cluster_job

PAD, BEGIN, END = 0, 1, 2
CHUNK = 10_000  # pairs that are encoded at a time


def encode(source: list[str], target: list[str], vocabulary: int, length: int) -> dict[str, Any]:
    """ "source" (n, length) and "target" (n, length + 1), from BEGIN to END: int32, padded; "vocabulary", "tokenizer"."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["[PAD]", "[BEGIN]", "[END]"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator([*source, *target], trainer)

    def padded(rows: list[list[int]], width: int) -> Tensor:
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int32).view(-1, width)

    parts = []
    for i in range(0, len(source), CHUNK):
        both = (tokenizer.encode_batch(sentences[i : i + CHUNK]) for sentences in (source, target))
        pairs = [(a.ids, [BEGIN, *b.ids, END]) for a, b in zip(*both, strict=True)
                 if 0 < len(a.ids) <= length and 0 < len(b.ids) < length]  # fmt: skip
        parts.append((padded([a for a, _ in pairs], length), padded([b for _, b in pairs], length + 1)))
    sources, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    if not len(sources):
        raise ValueError(f"no pair of sentences has at most {length} tokens: give a greater --length")
    return {
        "source": sources,
        "target": targets,
        "vocabulary": tokenizer.get_vocab_size(),
        "tokenizer": tokenizer.to_str(),
    }


class Translator(nn.Module):
    """Tokens (n, 2 * length), the source's and then those of the translation so far -> logits (n, length, vocabulary)."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int = 8) -> None:
        super().__init__()
        self.length = length
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.transformer = nn.Transformer(width, heads, layers, layers, 4 * width, batch_first=True, norm_first=True,
                                          custom_encoder=encoder)  # fmt: skip
        self.register_buffer("causal", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, pairs: Tensor) -> Tensor:
        source, target = pairs.long().split(self.length, 1)
        unread = source == PAD
        seen = self.transformer(
            self._embed(source), self._embed(target), tgt_mask=self.causal, src_key_padding_mask=unread,
            memory_key_padding_mask=unread,
        )  # fmt: skip
        return nn.functional.linear(seen, self.tokens.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) * self.tokens.embedding_dim**0.5 + self.places.weight


def build(config: dict[str, Any]) -> TrainingTask:
    data = torch.load(config["encoded"], weights_only=True, mmap=True)
    inputs = torch.cat([data["source"], data["target"][:, :-1]], 1)
    targets = data["target"][:, 1:]
    held_out = torch.arange(len(inputs)) % config["held_out"] == 0
    tokens = float((targets[~held_out] != PAD).sum(1).float().mean())

    def loss(logits: Tensor, wanted: Tensor, smoothing: float = 0.1) -> Tensor:
        """A sum over tokens, so that batches and workers count by their rows, in units of a sentence of the mean length."""
        total = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten().long(), ignore_index=PAD,
                                            label_smoothing=smoothing, reduction="sum")  # fmt: skip
        return total / (len(wanted) * tokens)

    model = Translator(data["vocabulary"], targets.shape[1], config["width"], config["layers"])
    return TrainingTask(
        model, torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9), loss,
        train_data=(inputs[~held_out], targets[~held_out]), val_data=(inputs[held_out], targets[held_out]),
        batch_size=config["batch_size"], eval_batch_size=256, clip_norm=1.0, autocast=True, compile=config["compile"],
        metrics={"nats_per_token": lambda logits, wanted: loss(logits, wanted, smoothing=0.0)},
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = cluster_job.parser(__doc__, "translation", 10, "the files without their endings, which all nodes see")
    made.add_argument("--source", default="en", help="ending of the source's file (default en)")
    made.add_argument("--target", default="de", help="ending of the target's file (default de)")
    made.add_argument("--vocabulary", type=int, default=32_000, help="tokens (default 32,000)")
    made.add_argument("--length", type=int, default=64, help="most tokens of a sentence (default 64)")
    made.add_argument("--width", type=int, default=512, help="of the model, for its 8 heads (default 512)")
    made.add_argument("--layers", type=int, default=6, help="of the encoder, and of the decoder (default 6)")
    made.add_argument("--held-out", type=int, default=200, help="every which pair chooses (default 200)")
    return made


def sentences(*files: Path) -> list[list[str]]:
    """The lines of both files. Raises ValueError where one has more of them."""
    texts = [file.read_text("utf-8").removesuffix("\n").split("\n") for file in files]
    if len(texts[0]) != len(texts[1]):
        raise ValueError(f"{files[0]} has {len(texts[0])} lines and {files[1]} {len(texts[1])}: they are read in pairs")
    return texts


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration of a trial. Writes the encoded text beside the files, where it is not there yet."""
    ends, sizes = (arguments.source, arguments.target), (arguments.vocabulary, arguments.length)
    files = [Path(f"{arguments.data}.{end}") for end in ends]
    stem = files[0].with_suffix(f".{'-'.join(ends)}")
    encoded = cluster_job.made_once(stem, files, sizes, lambda: encode(*sentences(*files), *sizes))
    names = ("width", "layers", "held_out", "batch_size", "compile")
    return {"encoded": str(encoded), **{name: getattr(arguments, name) for name in names}}


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    cluster_job.join_cluster()
    result = autolrs_ray.run(
        build, epochs=arguments.epochs, config=config_of(arguments), name=arguments.name, storage_path=arguments.storage,
        resources=cluster_job.resources(arguments), workers="elastic",
    )  # fmt: skip
    print(cluster_job.told(result))


if __name__ == "__main__":
    main()
