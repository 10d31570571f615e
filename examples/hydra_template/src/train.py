"""Train what the configuration describes: the usual Lightning + Hydra script.

It names no strategy; `configs/train.yaml` and `configs/trainer/default.yaml` do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

import lrcnn_lightning  # noqa: F401  (makes the names of the strategies known)

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `src.model` and `src.data`


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> float:
    seed_everything(config.seed, workers=True, verbose=False)

    datamodule = hydra.utils.instantiate(config.data)
    model = hydra.utils.instantiate(config.model)
    callbacks = [hydra.utils.instantiate(callback) for callback in config.callbacks.values()]
    trainer = hydra.utils.instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(model, datamodule=datamodule)

    for name, value in trainer.callback_metrics.items():
        print(f"{name}: {float(value):.6g}")
    return float(trainer.callback_metrics["val/accuracy"])


if __name__ == "__main__":
    main()
