"""Every training on a toy set, for the tests of resuming and of many processes."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from harmonylib.core import cache
from harmonylib.core.distributed import by_first
from harmonylib.core.images import write_image
from harmonylib.core.seeds import rng
from harmonylib.data.batches import TripleSet
from harmonylib.data.layout import read_triples, write_composite, write_list, write_pair
from harmonylib.evaluation.methods import Method, evaluate, identity_method
from harmonylib.models import refinement
from harmonylib.models.base import build_autoencoder, build_unet, open_base, train_base
from harmonylib.models.contrastive import ResUNetLoss, resunet_batches
from harmonylib.models.diffusion import DiffHarmonyLoss, base_scheduler, diffharmony_batches
from harmonylib.models.pipeline import DiffHarmonyPipeline, PromptEmbedding
from harmonylib.models.start import initial_harmony_vae, initial_prompt, initial_resunet, initial_unet
from harmonylib.models.vae import HarmonyVAE, harmony_vae_batches, harmony_vae_loss
from harmonylib.training import TrainSettings, train

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


def trained(trainer: str, root, steps: int = 5, checkpoints=None, options=None) -> dict[str, torch.Tensor]:
    """The weights after training on the set in `root`, where caches also go. Batches of 4, fp32."""
    os.chdir(root)
    data = TripleSet(read_triples("set", "train"), SIZE)
    settings = TrainSettings(steps, 4, 1e-3, ema_decay=0.5, precision="fp32", checkpoint_seconds=0, **options or {})
    loop = {"name": trainer, "seed": 0, "device": "cpu", "checkpoints": checkpoints}
    section = SimpleNamespace(batch_size=4, size=SIZE, mask_init="zero", train_decoder=True, mask_start="base",
                              base_channels=8, depth=4, residual_convs=1, style="style-fusion", head="colour",
                              encoder=None, view=32, recolor=0.5, restyle=0.5, jitter=0.5,
                              affine="constant", flip=True)  # fmt: skip
    fixed = SimpleNamespace(**vars(section) | {"recolor": 0.0, "edge": True, "first_step": 0.5})
    if trainer == "harmony_vae":
        torch.manual_seed(0)
        model = initial_harmony_vae(fixed, None, build_autoencoder((8, 16), size=SIZE), 0)
        loss, batches = harmony_vae_loss(), harmony_vae_batches(model, data, "harmonize", fixed, 0)
    elif trainer == "diffharmony":
        pipeline = inverse_pipeline()
        torch.manual_seed(0)
        prompt = initial_prompt(fixed, None, pipeline, "harmonize")
        model, loss = initial_unet(fixed, None, pipeline), DiffHarmonyLoss(pipeline, prompt, first=fixed.first_step)
        batches = diffharmony_batches(pipeline.vae, data, "harmonize", fixed, 0)
    elif trainer == "contrastive_resunet":
        model, loss = initial_resunet(section, None, 0), ResUNetLoss(patches=8)
        batches = resunet_batches(data, section, 0)
    elif trainer == "refinement":
        latents = refinement.sample_latents(inverse_pipeline(), data, 0, steps=1)
        outputs = refinement.decode_latents(inverse_pipeline().vae, latents, data, SIZE, 0)
        model, loss = refinement.initial_refiner((8, 16), 0), refinement.refinement_loss
        batches = refinement.refinement_batches(outputs, data, 4, 0)
    else:
        part = SimpleNamespace(source="small", size=16, autoencoder_size=16, batch_size=4, learning_rate=1e-3,
                               autoencoder_steps=steps, unet_steps=steps, checkpoint_seconds=0,
                               autoencoder_channels=(16, 16), unet_channels=(64, 64))  # fmt: skip
        run = SimpleNamespace(
            base=part, seed=0, device="cpu", precision="fp32", compile=False, accumulation=1, checkpointing=False
        )
        pipeline = open_base(part, 0)
        train_base(pipeline, list(zip(data.reals, data.masks, strict=True)), run, checkpoints)
        return pipeline.unet.state_dict()
    train(model, loss, batches, settings, **loop)
    return model.state_dict()


TRAINERS = ("diffharmony", "harmony_vae", "contrastive_resunet", "refinement", "pretrain")


def write_trained(trainer: str, root, out: str, steps: int = 5, checkpoints=None, options=None) -> None:
    """Write `trained` to the file `out`; in a group the first process does, and all go on when it is there."""
    weights = trained(trainer, root, steps, checkpoints, options)
    by_first(lambda: torch.save(weights, Path(root, out)), "cpu")
    assert Path(root, out).exists()


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
    cache.moments(vae, noise_pictures(root), "cpu", batch_size)


def score_set(root, name: str) -> None:
    """Score the set in `root` into the cache `root`/`name`, and note what each process had to harmonize."""
    os.chdir(root)
    cache.ROOT, rank, seen = Path(name), os.environ.get("RANK", 0), []

    def darker(composite, mask, names):
        seen.extend(names)
        Path(f"{name}-{rank}.txt").write_text(str(len(seen)))
        while len(list(Path().glob(f"{name}-*.txt"))) < int(os.environ.get("WORLD_SIZE", 1)):
            time.sleep(0.01)
        return composite / 2

    methods = [identity_method(), Method("darker", darker, ["darker"])]
    table = evaluate(methods, TripleSet(read_triples("set", "train"), SIZE), 1, ("standard", "diffharmony"))
    table.to_csv(f"{name}-{rank}.csv")


def noise_pictures(root, count: int = 14) -> cache.Squares:
    paths = [Path(root, f"noise-{n}.png") for n in range(count)]
    for path in paths:
        if not path.exists():
            write_image(path, rng(path.name).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    return cache.Squares(paths, SIZE, "squash")
