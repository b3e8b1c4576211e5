"""Are batch-norm statistics of averaged weights better averaged, or estimated anew on training batches?

    python -m experiments.batch_norm       # half a minute; writes experiments/results/batch_norm.md

The digits task (`experiments.digits_task`: three batch norms, batches of 32) at LR .1 under the race's envelope. At a fifth of
the run, at half of it and at its end every average of the weights is evaluated on the validation and on the test data twice:
with the averages of the statistics, and with statistics of BATCHES training batches. Positive: estimating anew is better. Mean
± standard deviation over the seeds of the difference, both sides at the same weights.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from autolrs_ray.core.envelopes import lr_factor
from autolrs_ray.training.trainer import Trainer
from experiments.digits_task import build, split
from experiments.tables import markdown

OUT = Path(__file__).parent / "results" / "batch_norm.md"
SEEDS, STEPS, LR, BATCHES = range(5), 300, 0.1, 50
WARMUP = STEPS // 5


def losses(trainer: Trainer, batches: int) -> list[float]:
    """Of each average, on validation and test data, with statistics of `batches` batches, or (0) averaged ones."""
    trainer.task.reestimate = batches
    state = trainer.state_dict()["averages"]
    kept = [{name: value.clone() for name, value in weights.items()} for weights in state["weights"]]
    found = [m["loss"] for data in (None, split()["test"]) for m in trainer.evaluate_averages(data)]
    assert trainer.averages is not None
    trainer.averages.load_state_dict({**state, "weights": kept})  # estimates are kept: take them out again
    trainer.task.reestimate = 0
    return found


def gains(seed: int) -> dict[int, list[tuple[float, float]]]:
    """By step, for each average and data, the loss with averaged statistics, and how much lower the other is."""
    trainer = Trainer(lambda: build({}), seed, averaging=True)
    found = {}
    for step in (STEPS // 5, STEPS // 2, STEPS):
        trainer.train(step, lambda t: LR * lr_factor("quadratic", t, STEPS, WARMUP))
        pairs = zip(losses(trainer, 0), losses(trainer, BATCHES), strict=True)
        found[step] = [(averaged, averaged - anew) for averaged, anew in pairs]
    return found


def main() -> None:
    runs = [gains(seed) for seed in SEEDS]
    rows = []
    for step in runs[0]:
        for index, name in enumerate((0.25, 0.5, 1.0)):
            row = [f"step {step}, over {name:g} of the run"]
            for data in (0, 3):
                averaged = [run[step][data + index][0] for run in runs]
                gained = [run[step][data + index][1] for run in runs]
                row += [
                    f"{statistics.mean(averaged):.4f}",
                    f"{statistics.mean(gained):.4f} ± {statistics.stdev(gained):.4f}",
                ]
            rows.append(row)
    heads = ["average", "val loss", "lower by", "test loss", "lower by"]
    text = f"Made by `python -m experiments.batch_norm`, which says what the columns are; {len(SEEDS)} seeds, {STEPS} steps."
    OUT.write_text(f"# Batch-norm statistics of averaged weights\n\n{text}\n\n{markdown(heads, rows)}\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
