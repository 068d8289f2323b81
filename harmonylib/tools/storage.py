"""What a run with Stable Diffusion's networks leaves on disk, in bytes, of iHarmony4 and Human Harmony."""

COMPOSITES, TEST = 65_742, 7_404  # iHarmony4's lists
SMALL_PAIRS, HUMAN_PAIRS = 4_945, 29_106  # of HFlickr and Hday2night (tests included), and of Human Harmony
UNET = 859_535_364  # parameters


def cache_entries(run, composites: int, reals: int) -> dict[str, int]:
    """{what artifacts/cache holds of the training list: bytes}."""
    vae, unet, resunet = run.harmony_vae, run.diffharmony, run.resunet
    found = {}
    for name, part in (("Harmony-VAE", vae), ("ResUNet", resunet)):
        pixels = part.size**2
        found[f"{name}: masks, {part.size} px"] = composites * pixels
        found[f"{name}: reals, {part.size} px"] = 3 * reals * pixels
        if part.recolor < 1:
            found[f"{name}: composites, {part.size} px"] = 3 * composites * pixels
    found[f"DiffHarmony: masks, {unet.size} px"] = composites * unet.size**2
    if not unet.recolor:
        found[f"DiffHarmony: latents, {unet.size} px"] = 32 * (composites + reals) * (unet.size // 8) ** 2
    return found


BYTES_A_PIXEL = {"png": 1.7, "jpg": 0.45}  # of photos, roughly


def disk(run, composites: int, reals: int) -> dict[str, float]:
    """{what lies on disk at the end: bytes}, roughly."""
    human, small = run.human_harmony, run.augmentation
    pipeline = 4 * (UNET + 120e6)
    return {
        "hub (Stable Diffusion and its text encoder)": 5e9,
        "artifacts/cache": min(1e9 * run.cache_gb, sum(cache_entries(run, composites, reals).values())),
        "artifacts/checkpoints (three resume points)": 3 * 16 * UNET,
        "trained models, twice where DVC copies them": 2 * 3 * pipeline,
        "candidates of the small subsets": SMALL_PAIRS * small.candidates * small.size**2 * BYTES_A_PIXEL[small.format],
        "candidates of Human Harmony": HUMAN_PAIRS * human.candidates * human.size**2 * BYTES_A_PIXEL[human.format],
        "data/human_harmony": 2 * HUMAN_PAIRS * human.size**2 * BYTES_A_PIXEL[human.format],
    }
