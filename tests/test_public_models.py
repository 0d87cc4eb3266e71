"""The page on models of public repositories: every block of it runs, from a file as the authors' code writes it to samples.

On stand-ins whose classes and calls have the names that the repositories give them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_blocks import Record, blocks, run_python
from public_models import PublicDeepVAE, PublicNVAE, PublicVDVAE, vdvae_inputs, vdvae_targets
from stand_ins import perturbed
from stand_ins_biva import DeepVae, ready
from stand_ins_careamics import CAREamicsLadder, GaussianLikelihood
from stand_ins_efficient_vdvae import EfficientVDVAE, MixtureLoss, hyper_parameters, std_loss
from stand_ins_ladder_vae import LadderVAE, crop_img_tensor
from stand_ins_qres import HierarchicalVAE
from torch import Tensor, nn

import energy_prior
from energy_prior import check_generator

PAGE = "docs/public-models.md"


class Family:
    """A family of models, in the folder that its test runs in.

    Attributes:
        names: what the repository's own code gives, and x and images.
        saved: weights that a file was written with, which the model of the block then has.
    """

    names: dict[str, Any]
    saved: nn.Module


class AutoEncoder(PublicNVAE):
    """With the arguments of NVAE's class, of which it reads what older checkpoints lack."""

    def __init__(self, args: argparse.Namespace, writer: None, arch_instance: str) -> None:
        assert (args.ada_groups, args.min_groups_per_scale, args.num_mixture_dec) == (False, 2, 10)
        assert arch_instance == "cells of res_mbconv"
        super().__init__(flows=args.num_nf)


class NVAEFamily(Family):
    def __init__(self) -> None:
        args = argparse.Namespace(num_nf=1, arch_instance="res_mbconv", min_groups_per_scale=2)
        self.saved = perturbed(PublicNVAE(flows=1))
        state = {f"module.{name}": value for name, value in self.saved.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state, "args": args, "arch_instance": {}}, "checkpoint.pt")
        images = torch.rand(32, 1, 16, 16).round()
        self.names = {"AutoEncoder": AutoEncoder, "get_arch_cells": "cells of {}".format, "images": images}


class Hyperparams(dict[str, Any]):
    """A dict whose entries are attributes too, as in openai/vdvae."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class VDVAEFamily(Family):
    def __init__(self) -> None:
        self.saved = perturbed(PublicVDVAE())
        torch.save(self.saved.state_dict(), "imagenet32-iter-1700000-model-ema.th")
        entries = [
            {"time": "now", "type": "hparam", "key": "width", "value": 7},
            {"time": "now", "type": "train_loss", "elbo": 4.2},
        ]
        Path("imagenet32-iter-1700000-log.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
        self.names = {"Hyperparams": Hyperparams, "VAE": self._vae, "inputs": vdvae_inputs, "targets": vdvae_targets}
        self.names["images"] = torch.randint(0, 256, (32, 3, 8, 8)) / 255

    def _vae(self, hyper_parameters: Any) -> nn.Module:
        assert (hyper_parameters.width, hyper_parameters.image_size, len(hyper_parameters)) == (7, 32, 3)
        return PublicVDVAE()


class DeepVAEFamily(Family):
    def __init__(self) -> None:
        self.saved = perturbed(PublicDeepVAE(ladder=True))
        folder = Path("runs/my_run")
        folder.mkdir(parents=True)
        torch.save("LVAE", folder / "model_class_name.pt")
        torch.save({"kwargs": {"ladder": True, "input_shape": torch.Size([10])}}, folder / "model_kwargs.pt")
        torch.save(self.saved.state_dict(), folder / "model_state_dict.pt")
        self.names = {"VAE": self._vae, "images": torch.randint(0, 2, (32, 10)).float()}

    def _vae(self, ladder: bool, input_shape: torch.Size) -> nn.Module:
        assert input_shape == (10,)
        return PublicDeepVAE(ladder=ladder)


class BIVAFamily(Family):
    def __init__(self) -> None:
        self.saved = ready(DeepVae())
        Path("runs/binmnist-biva-seed42").mkdir(parents=True)
        torch.save(self.saved.state_dict(), "runs/binmnist-biva-seed42/model.pth")
        self.names = {"DeepVae": DeepVae, "hyperparameters": {}, "images": torch.rand(32, 1, 4, 4).round()}


class LadderVAEFamily(Family):
    def __init__(self) -> None:
        self.saved = perturbed(LadderVAE())
        Path("output/my_run/checkpoints").mkdir(parents=True)
        torch.save(self.saved.state_dict(), "output/my_run/checkpoints/model_100000.pt")
        self.names = {"LadderVAE": LadderVAE, "arguments": {}, "crop_img_tensor": crop_img_tensor}
        self.names["images"] = torch.rand(32, 1, 6, 7).round()


class EfficientVDVAEFamily(Family):
    def __init__(self) -> None:
        hparams = hyper_parameters()
        other, self.saved = EfficientVDVAE(hparams), EfficientVDVAE(hparams)
        states = {"model_state_dict": other.state_dict(), "ema_model_state_dict": self.saved.state_dict()}
        torch.save({"global_step": 1, **states}, "checkpoints-NAME")
        self.names = {"UniversalAutoEncoder": lambda: EfficientVDVAE(hparams, run=False), "hparams": hparams}
        self.names |= {"loss": MixtureLoss(hparams), "calculate_std_loss": std_loss}
        self.names["images"] = torch.randint(0, 256, (32, 3, 8, 8)) / 255


class CAREamicsFamily(Family):
    def __init__(self) -> None:
        self.saved = perturbed(CAREamicsLadder())
        state = {f"model.{name}": value for name, value in self.saved.state_dict().items()}
        torch.save({"epoch": 1, "global_step": 2, "state_dict": state, "optimizer_states": []}, "last.ckpt")
        self.names = {"model_factory": lambda config: CAREamicsLadder(**config), "config": {}}
        self.names |= {"GaussianLikelihood": GaussianLikelihood, "images": torch.randn(32, 1, 8, 8)}


class LossyVAEFamily(Family):
    """Of 64 × 64 images, 16 × 16 at the top: the stand-in has a stride of 4."""

    def __init__(self) -> None:
        self.saved = perturbed(HierarchicalVAE(1.0))
        Path("runs/default/qres34m_0").mkdir(parents=True)
        saved = {"model": self.saved.state_dict(), "epoch": 0.5, "iter": 1000, "results": {"loss": 1.0}}
        torch.save(saved, "runs/default/qres34m_0/last_ema.pt")
        self.names = {"get_model": self._model, "images": torch.randint(0, 256, (8, 3, 64, 64)) / 255}

    def _model(self, name: str, lmb: float) -> nn.Module:
        assert (name, lmb) == ("qres34m", 2048)
        model: Any = HierarchicalVAE(lmb)
        own = model.decoder.forward_uncond
        model.decoder.forward_uncond = lambda size: own((size[0], 16 * size[1], 16 * size[2]))
        return model


FAMILIES: dict[str, Callable[[], Family]] = {
    "NVAEAdapter": NVAEFamily,
    "VDVAEAdapter": VDVAEFamily,
    "EfficientVDVAEAdapter": EfficientVDVAEFamily,
    "DeepVAEAdapter": DeepVAEFamily,
    "BIVAAdapter": BIVAFamily,
    "LadderVAEAdapter": LadderVAEFamily,
    "CAREamicsAdapter": CAREamicsFamily,
    "QResVAEAdapter": LossyVAEFamily,
}


def test_every_block_is_of_a_family() -> None:
    assert len(blocks(PAGE)) == len(FAMILIES)


SLOW = ("QResVAEAdapter",)
"""The closed part of energies of layers of 2,000 units is what takes long."""


@pytest.mark.parametrize("adapter", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES])
def test_from_a_file_to_samples(
    adapter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Record,
) -> None:
    """All three calls of the model agree with its adapter, which has the weights of the file."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    family = FAMILIES[adapter]()
    said: list[Any] = []

    def check(*arguments: Any, **calls: Any) -> None:
        said.append(check_generator(*arguments, **calls))

    monkeypatch.setattr(energy_prior, "check_generator", check)
    images: Tensor = family.names["images"]
    (block,) = [b for b in blocks(PAGE, "python") if f"import {adapter}" in b.code]
    short = {"prior.fit(images)": 'prior.fit(images, "nce", iterations=3, batch_size=8, progress=False)'}
    names = run_python([block], {**family.names, "x": images[:4]}, record_property, short)
    assert [line.partition(":")[0] for line in said[0]][-3:] == ["sample", "reconstruct", "kl"]
    loaded = dict(names["model"].named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in family.saved.named_parameters())
    assert capsys.readouterr().out.splitlines()[-1] == f"torch.Size([16, {', '.join(map(str, images.shape[1:]))}])"
