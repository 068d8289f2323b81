"""Every trainer on a toy set, for the tests of resuming and of many processes."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from harmonylib import trainers
from harmonylib.core import cache
from harmonylib.core.seeds import rng
from harmonylib.data.batches import TripleSet
from harmonylib.data.layout import read_triples, write_composite, write_list, write_pair
from harmonylib.models import base as pretrain
from harmonylib.models import refinement
from harmonylib.models.base import build_autoencoder, build_unet
from harmonylib.models.diffusion import base_scheduler
from harmonylib.models.pipeline import DiffHarmonyPipeline, PromptEmbedding
from harmonylib.models.vae import HarmonyVAE
from harmonylib.training import TrainSettings

SIZE = 32


def make_set(root, pairs: int = 3):
    """An iHarmony4-layout set of noise photos, two composites a pair."""
    lines, draw = [], rng("toy set")
    for number in range(pairs):
        real = draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[4:20, 4 + number : 24] = True
        pair = write_pair(root, "HFlickr", f"f{number}", 1, real, mask, suffix=".png")
        lines += [write_composite(root, "HFlickr", pair, v, 255 - real // v, suffix=".png") for v in (1, 2)]
    write_list(root, "train", lines)
    write_list(root, "test", lines[:2])


def inverse_pipeline() -> DiffHarmonyPipeline:
    torch.manual_seed(0)
    vae = HarmonyVAE.from_vae(build_autoencoder((8, 16), size=SIZE), skip_init="random")
    pipeline = DiffHarmonyPipeline(vae, build_unet((32, 32), prompt_dim=8), base_scheduler("v_prediction"),
                                   PromptEmbedding(2, 8))  # fmt: skip
    return pipeline.to("cpu")


def trained(trainer: str, root, steps: int = 5, checkpoints=None) -> dict[str, torch.Tensor]:
    """The weights after training on the set in `root`, where caches also go. Batches of 4, fp32."""
    os.chdir(root)
    torch.manual_seed(0)
    data = TripleSet(read_triples("set", "train"), SIZE)
    settings = TrainSettings(steps, 4, 1e-3, ema_decay=0.5, precision="fp32", checkpoint_seconds=0)
    loop = {"seed": 0, "device": "cpu", "checkpoints": checkpoints}
    if trainer == "harmony_vae":
        vae = build_autoencoder((8, 16), size=SIZE)
        model, _ = trainers.harmony_vae(vae, data, "harmonize", settings, **loop)
    elif trainer == "diffharmony":
        model, _ = trainers.diffharmony(inverse_pipeline(), data, "inverse", settings, **loop)
    elif trainer == "contrastive_resunet":
        model, _ = trainers.contrastive_resunet(
            data,
            settings,
            base_channels=8,
            depth=4,
            residual_convs=1,
            head="colour",
            view=32,
            patches=8,
            recolor=0.5,
            restyle=0.5,
            jitter=0.5,
            **loop,
        )
    elif trainer == "refinement":
        latents = refinement.sample_latents(inverse_pipeline(), data, 0, steps=1)
        outputs = refinement.decode_latents(inverse_pipeline().vae, latents, data, SIZE, 0)
        model, _ = trainers.refinement(outputs, data, settings, channels=(8, 16), **loop)
    else:
        photos = [(data.reals[index], data.masks[index]) for index in range(len(data.reals))]
        base = pretrain.BaseSettings(settings, settings, 16, 16, (8, 16), (32, 32), prompt_dim=8)
        out = f"base-of-{os.environ.get('WORLD_SIZE', '1')}"
        pretrain.pretrain(photos, out, base, 0, "cpu", checkpoints)
        assert Path(out, "training.json").exists()  # in every process
        return DiffHarmonyPipeline.from_pretrained(out, device="cpu").unet.state_dict()
    return model.state_dict()


TRAINERS = ("diffharmony", "harmony_vae", "contrastive_resunet", "refinement", "pretrain")


def write_trained(trainer: str, root, out: str, steps: int = 5, checkpoints=None) -> None:
    """Write `trained` to the file `out`; in a group only the first process does."""
    weights = trained(trainer, root, steps, checkpoints)
    if os.environ.get("RANK", "0") == "0":
        torch.save(weights, Path(root, out))


def encode_cache(root, name: str, batch_size: int = 4) -> None:
    """Encode 14 pictures into the cache `root`/`name`, each process while the others do, and note how many it was."""
    os.chdir(root)
    torch.manual_seed(0)
    vae, counts = build_autoencoder((8, 16), size=SIZE), Path(f"{name}-{os.environ.get('RANK', 0)}.txt")
    encode, encoded = vae.encode, []

    def noted(images):
        encoded.append(len(images))
        counts.write_text(str(sum(encoded)))
        while len(list(Path().glob(f"{name}-*.txt"))) < int(os.environ.get("WORLD_SIZE", 1)):
            time.sleep(0.01)
        return encode(images)

    vae.encode, cache.ROOT = noted, Path(name)
    images = np.stack([rng("images", n).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for n in range(14)])
    cache.moments(vae, images, "cpu", batch_size)
