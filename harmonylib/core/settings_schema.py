"""What params.yaml may hold: one model per section, every key with its type and bounds (`settings` reads the file).

profiles/mini.yaml says what each key means. Names that the code offers are repeated here, so that a mistake is found
before anything is imported or run; tests/test_settings.py holds the two together.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _ordered(bounds: list[float]) -> list[float]:
    if bounds[0] > bounds[1]:
        raise ValueError("the first must not be above the second")
    return bounds


SUBSETS = ("HCOCO", "HAdobe5k", "HFlickr", "Hday2night")
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=8)]
NotNegative = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Channels = Annotated[list[Positive], Field(min_length=2)]
Bounds = Annotated[list[NotNegative], Field(min_length=2, max_length=2), AfterValidator(_ordered)]


class Section(BaseModel):
    """Types are exact (an int may stand for a float), no other key is allowed, and nothing can be assigned."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    source: Literal["embedded", "photos", "iharmony4"]
    path: Text
    subsets: Annotated[list[Text], Field(min_length=1)]
    size: Pixels
    train_pairs: Count
    test_pairs: Count
    train_variants: Positive
    test_variants: Positive
    restyle_share: Share
    transfers: Annotated[list[Literal["reinhard", "xiao-ma", "histogram", "distribution"]], Field(min_length=1)]
    clipped: Share


class Base(Section):
    source: Literal["small", "stable-diffusion", "pipeline"]
    path: Text
    vae: Text | None
    autoencoder_steps: Count
    unet_steps: Count
    size: Pixels
    batch_size: Positive
    learning_rate: Rate
    autoencoder_channels: Annotated[list[Annotated[int, Field(ge=16)]], Field(min_length=2)]  # see identity_init
    unet_channels: Annotated[list[Annotated[int, Field(ge=64)]], Field(min_length=2)]


class Training(Section):
    """What the sections of the trained harmonizers have in common."""

    start: Text | None
    size: Pixels
    crop: Count
    flip: bool
    recolor: Share
    jitter: Share
    steps: Count
    batch_size: Positive
    learning_rate: Rate
    warmup: Share
    schedule: Literal["constant", "cosine"]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]

    @model_validator(mode="after")
    def _crop_fits(self):
        if self.crop > self.size:
            raise ValueError(f"crop is {self.crop}; it must not be above size, {self.size}")
        return self


class HarmonyVAE(Training):
    inverse_steps: Count
    inverse_learning_rate: Rate
    loss: Literal["l2", "l1"]
    train_decoder: bool
    mask_init: Literal["zero", "default"]


class DiffHarmony(Training):
    inverse_steps: Count
    inverse_learning_rate: Rate
    weight_decay: NotNegative
    mask_start: Literal["base", "zero"]
    foreground_loss: bool
    first_step: Share
    edge: bool
    inference_steps: Positive


class ResUNet(Training):
    weight_decay: NotNegative
    base_channels: Positive
    depth: Annotated[int, Field(ge=2)]
    residual_convs: Count
    style: Literal["style-fusion", "adain", "rain", "none"]
    affine: Literal["constant", "function"]
    head: Literal["residual", "colour"]
    encoder: Text | None
    view: Count
    weights: Annotated[list[NotNegative], Field(min_length=3, max_length=3)]
    error: Literal["l1", "rmse", "log"]
    reading: Literal["A", "B", "C"]
    patches: Positive
    masked_patches: bool
    restyle: Share

    @model_validator(mode="after")
    def _parts_fit(self):
        if self.encoder and (self.head != "colour" or not self.view):
            raise ValueError(f"encoder is {self.encoder!r}; it needs head: colour and a view, or set encoder: null")
        if self.head == "colour" and self.view and not self.encoder and self.depth < 3:
            raise ValueError(f"depth is {self.depth}; head: colour needs at least 3")
        return self


class Classifier(Section):
    backbone: Text
    size: Pixels
    composites: Positive
    regularisation: Annotated[list[Above0], Field(min_length=1)]


class Augmentation(Section):
    subsets: Annotated[list[Text], Field(min_length=1)]
    candidates: Positive
    gamma: NotNegative
    strength: Bounds
    size: Pixels
    temperature: Above0
    steps: Positive
    format: Literal["png", "jpg"]


class HumanHarmony(Section):
    source: Literal["embedded", "photos", "imaterialist"]
    path: Text
    pairs: Count
    candidates: Positive
    strength: Bounds
    foreground: Annotated[list[Share], Field(min_length=2, max_length=2), AfterValidator(_ordered)]
    min_side: Count
    faces: bool
    size: Pixels
    temperature: Above0
    steps: Positive
    format: Literal["png", "jpg"]

    @model_validator(mode="after")
    def _crops_are_made(self):
        if self.source == "embedded" and not self.pairs:
            raise ValueError("pairs is 0; source: embedded needs at least 1")
        return self


class Evaluation(Section):
    size: Pixels
    diffusion_size: Pixels
    strict: bool
    vanished: Literal["left-out", "scored"]
    batch_size: Positive
    composites: Annotated[list[Text], Field(min_length=1, max_length=2)]  # DVC watches the first and the last


class Ablations(Section):
    seeds: Positive
    resunet_steps: Count
    resunet_size: Pixels
    sizes: Annotated[list[Pixels], Field(min_length=1)]
    augmentation_steps: Count
    resolutions: Annotated[list[Pixels], Field(min_length=1)]
    refinement_composites: Positive
    refinement_steps: Count
    refinement_channels: Channels
    refinement_batch_size: Positive
    refinement_learning_rate: Rate
    refinement_schedule: Literal["constant", "cosine"]
    refinement_ema_decay: Annotated[float, Field(ge=0, lt=1)]
    harmony_vae_steps: Count


class Settings(Section):
    """A run's settings, with their keys as attributes: settings().resunet.steps."""

    profile: Text
    seed: Count
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: bool
    accumulation: Positive
    checkpointing: bool
    cache_gb: Above0
    data: Data
    base: Base
    harmony_vae: HarmonyVAE
    diffharmony: DiffHarmony
    classifier: Classifier
    augmentation: Augmentation
    human_harmony: HumanHarmony
    resunet: ResUNet
    evaluation: Evaluation
    ablations: Ablations

    @model_validator(mode="after")
    def _sections_fit(self):
        if (self.device, self.precision) == ("cpu", "fp16"):
            raise ValueError("precision is 'fp16'; device: cpu needs auto, fp32 or bf16")
        known = {*SUBSETS, *(self.data.subsets if self.data.source == "iharmony4" else ())}  # a set may have its own
        for key, names in (("data", self.data.subsets), ("augmentation", self.augmentation.subsets)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{key}.subsets has {unknown[0]!r}; it must be some of {', '.join(sorted(known))}")
        return self
