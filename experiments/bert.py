"""BERT as a masked language model, from scratch, on any text: transformers' model, tokenizers' word pieces.

    python -m experiments.bert --data corpus --storage runs --epochs 3
    ray job submit --working-dir . -- python -m experiments.bert --data /shared/corpus --storage /shared/runs --epochs 3 \
        --batch-size 256 --gpus 1 --cpus 5 --loaders 4 --compile

All *.txt files under DATA are read; a vocabulary is learned from them, and tokens and tokenizer are kept beside them, in
DATA/tokens-*.pt, once for these files: `BertWordPieceTokenizer` of its "words" reads and writes for the trained model.
BERT-base of Devlin et al. 2019, AdamW; 15 % of each window are asked for, by places that the window's own random numbers
choose: the same ones in every trial, and however many workers train it. Every 100th window chooses learning rates.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForMaskedLM

import autolrs_ray
from autolrs_ray import TrainingTask
from experiments import cluster_job

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASK = SPECIAL.index("[MASK]")
IGNORED = -100


def encode(files: list[str], vocabulary: int) -> dict[str, Any]:
    """ "tokens" (n,) int32 of all files, how many there are in the "vocabulary", and the "words" (word -> number)."""
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train(files, vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    ids = []
    for file in files:
        with open(file, encoding="utf-8", errors="replace") as text:
            while lines := list(islice(text, 10_000)):  # what is in memory at a time
                found = [token for line in tokenizer.encode_batch(lines) for token in line.ids]
                ids.append(torch.tensor(found, dtype=torch.int32))
    return {"tokens": torch.cat(ids), "vocabulary": tokenizer.get_vocab_size(), "words": tokenizer.get_vocab()}


class Masked(Dataset[tuple[Tensor, Tensor]]):
    """Windows of tokens (length,) of which 15 % are asked for: masked, but for a tenth, and another that become any token.

    windows: (n, length), which may lie on disk; rows: those that are taken. Draws from torch's generator, which is seeded for
    every row.
    """

    def __init__(self, windows: Tensor, rows: Tensor, vocabulary: int) -> None:
        self.windows, self.rows, self.vocabulary = windows, rows, vocabulary

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        tokens = self.windows[self.rows[row]].long()
        places = torch.randperm(len(tokens))[: max(1, round(0.15 * len(tokens)))]
        targets = torch.full_like(tokens, IGNORED)
        targets[places] = tokens[places]
        kind = torch.rand(len(places))
        tokens[places[kind < 0.8]] = MASK
        others = places[kind >= 0.9]
        tokens[others] = torch.randint(len(SPECIAL), self.vocabulary, (len(others),))
        return tokens, targets


def loss(output: Any, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that are asked for, equally many in every window."""
    return nn.functional.cross_entropy(output["logits"].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def build(config: dict[str, Any]) -> TrainingTask:
    data, length = torch.load(config["tokens"], weights_only=True, mmap=True), config["length"]
    windows = data["tokens"][: len(data["tokens"]) // length * length].view(-1, length)
    held_out = torch.arange(len(windows)) % config["held_out"] == 0
    train, val = (Masked(windows, mask.nonzero()[:, 0], data["vocabulary"]) for mask in (~held_out, held_out))
    width = config["width"]
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=data["vocabulary"],
            hidden_size=width,
            num_hidden_layers=config["layers"],
            num_attention_heads=max(1, width // 64),
            intermediate_size=4 * width,
            max_position_embeddings=length,
        )
    )
    return TrainingTask(
        model=model,
        optimizer=torch.optim.AdamW(cluster_job.parameter_groups(model, 0.01), lr=1e-4),
        loss=loss,
        train_data=train,
        val_data=val,
        batch_size=config["batch_size"],
        eval_batch_size=256,
        clip_norm=1.0,
        num_workers=config["loaders"],
        autocast=True,
        compile=config["compile"],
    )


def parser() -> argparse.ArgumentParser:
    made = cluster_job.parser(__doc__, "bert", epochs=3)
    made.add_argument("--vocabulary", type=int, default=30_522, help="word pieces (default 30,522)")
    made.add_argument("--length", type=int, default=128, help="tokens of a window (default 128)")
    made.add_argument("--width", type=int, default=768, help="of the model, 64 for each head (default 768)")
    made.add_argument("--layers", type=int, default=12, help="of the model (default 12)")
    made.add_argument("--held-out", type=int, default=100, help="every which window chooses (default 100)")
    made.add_argument("--loaders", type=int, default=0, help="processes a worker that mask tokens (default 0: itself)")
    return made


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration of a trial. Writes the tokens beside the files, where they are not there yet."""
    folder = Path(arguments.data).absolute()
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise FileNotFoundError(f"no *.txt files under {folder}")
    size = arguments.vocabulary
    tokens = cluster_job.made_once(folder / "tokens", files, size, lambda: encode([str(file) for file in files], size))
    names = ("length", "width", "layers", "held_out", "loaders", "batch_size", "compile")
    return {"tokens": str(tokens), **{name: getattr(arguments, name) for name in names}}


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    cluster_job.join_cluster()
    result = autolrs_ray.run(
        build,
        epochs=arguments.epochs,
        config=config_of(arguments),
        name=arguments.name,
        storage_path=arguments.storage,
        resources=cluster_job.resources(arguments),
        workers="elastic",
    )
    print(cluster_job.told(result))


if __name__ == "__main__":
    main()
