"""One frozen, validated config per stage. The same object is the CLI flags, the TOML file and what a run folder keeps.

Every field's docstring is its help text on the command line. Unknown keys are errors that name the nearest right key.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pix2mass.types import Pix2massError, check_bands


class Config(BaseModel):
    """Base of all configs: immutable, no unknown keys, field docstrings are the descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


def _check_bands(value: str) -> str:
    try:
        return check_bands(value)
    except Pix2massError as error:
        raise ValueError(str(error)) from None


Bands = Annotated[str, AfterValidator(_check_bands)]


class GridConfig(Config):
    """The pixel grid that every cutout of a store shares."""

    bands: Bands = "ugriz"
    """Bands to keep, an ordered subset of ugriz."""
    width_kpc: float | None = Field(default=2000.0, gt=0)
    """Width of a cutout in proper kpc at the cluster's redshift (the default: 2 Mpc)."""
    width_arcsec: float | None = Field(default=None, gt=0)
    """Width of a cutout in arcsec, the same at every redshift; takes the place of width_kpc."""
    n_pixels: int = Field(default=64, ge=8, le=4096)
    """Pixels on a side."""

    @model_validator(mode="before")
    @classmethod
    def _arcsec_replaces_kpc(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("width_arcsec") is not None and "width_kpc" not in values:
            return {**values, "width_kpc": None}
        return values

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if (self.width_kpc is None) == (self.width_arcsec is None):
            raise ValueError("give either width_kpc or width_arcsec, not both and not neither")
        return self


class MockConfig(Config):
    """The mock survey: how many clusters, over which masses and redshifts, seen how well."""

    n_labelled: int = Field(default=800, ge=20)
    """Clusters with a mass label."""
    n_unlabelled: int = Field(default=1200, ge=20)
    """Clusters without a label, for pretraining."""
    log10_m500c_min: float = Field(default=13.5, ge=13.0, le=15.5)
    """Lowest true mass; masses are drawn flat in log10."""
    log10_m500c_max: float = Field(default=15.2, ge=13.0, le=15.5)
    """Highest true mass."""
    z_min: float = Field(default=0.1, ge=0.05, le=0.55)
    """Lowest redshift; redshifts are drawn flat."""
    z_max: float = Field(default=0.4, ge=0.05, le=0.55)
    """Highest redshift."""
    label_scatter_dex: float = Field(default=0.12, ge=0)
    """Gaussian measurement scatter of the mass labels."""
    richness_scatter_ln: float = Field(default=0.22, ge=0)
    """Lognormal scatter of richness at fixed mass, beside Poisson noise."""
    miscentred_share: float = Field(default=0.2, ge=0, le=1)
    """Share of clusters whose catalogued position is off the centre of the galaxies."""
    miscentring_kpc: float = Field(default=200.0, ge=0)
    """Rayleigh scale of that offset in proper kpc."""
    diffuse_light_share: float = Field(default=0.3, ge=0)
    """Diffuse intracluster light as a fraction of the brightest galaxy's."""
    depth_r_mag: float = Field(default=23.0, ge=18, le=23)
    """Faintest r magnitude of galaxies and stars that are drawn."""
    projected_groups: bool = True
    """Put part of the foreground and background galaxies into groups and clusters of their own."""
    ebv_min_mag: float = Field(default=0.02, ge=0)
    """Lowest Galactic reddening E(B-V); drawn flat per cluster and applied to the pixels."""
    ebv_max_mag: float = Field(default=0.06, ge=0)
    """Highest Galactic reddening E(B-V)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.log10_m500c_min >= self.log10_m500c_max or self.z_min >= self.z_max:
            raise ValueError("each _min must lie below its _max")
        if self.ebv_min_mag > self.ebv_max_mag:
            raise ValueError("ebv_min_mag must not exceed ebv_max_mag")
        return self


class BuildConfig(Config):
    """Images for a catalogue: where they come from. Exactly one source."""

    frames: str | None = None
    """Folder or URL of SDSS frames in the archive's own layout (what stands before /dr12)."""
    frame_index: Path | None = None
    """Table of the frames that exist, as written by `pix2mass catalog frames`; needed for large archives."""
    cutouts: str | None = None
    """Pattern of your own FITS cutouts, e.g. 'DIR/{id}-{band}.fits'."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.frames is None) == (self.cutouts is None):
            raise ValueError("give one source of images: --frames BASE or --cutouts 'DIR/{id}-{band}.fits'")
        return self


class CatalogConfig(Config):
    """Labelled and unlabelled clusters from published catalogues. Give catalogs or vizier."""

    catalogs: Path | None = None
    """Folder of catalogues told by their columns: redMaPPer, MCXC, MCXC-II, PSZ2, ACT DR5, SPIDERS and your own."""
    vizier: str | None = None
    """Base URL of a VizieR service to fetch the catalogues from, e.g. https://vizier.cds.unistra.fr."""
    cache: Path = Path("catalog-cache")
    """Folder that keeps what was fetched; delete it to fetch again."""
    prefer: str = "own,act-dr5,psz2,mcxc-ii,mcxc"
    """Whose label a cluster gets where several have one, best first; a catalogue left out gives no labels."""
    counterpart_names: bool = True
    """Match by the names of redMaPPer clusters that a catalogue gives (PSZ2) before matching by position."""
    radius_arcmin: float | None = Field(default=None, gt=0)
    """Matching radius; the larger of half of R500 and the position error of each row if not given."""
    dz: float = Field(default=0.05, gt=0)
    """Matched clusters differ by less than this in redshift."""
    scale: Literal["apply", "carry", "none"] = "apply"
    """Offsets between label sources: subtract them, only write them beside each label, or leave labels as published."""
    scale_reference: str = "mcxc"
    """Label source whose scale is kept."""
    bootstrap: int = Field(default=1000, ge=100)
    """Resamplings for the errors of the offsets."""
    concentration: Literal["diemer19", "duffy08", "bhattacharya13", "diemer15", "child18"] = "diemer19"
    """Concentration-mass relation for masses that are not M500c."""
    dust_maps: Path | None = None
    """Folder with the two maps of Schlegel, Finkbeiner & Davis 1998, read through sfdmap2."""

    @property
    def preference(self) -> tuple[str, ...]:
        """The names in ``prefer``."""
        return tuple(name.strip().lower() for name in self.prefer.split(",") if name.strip())

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.catalogs is None) == (self.vizier is None):
            raise ValueError("say where the catalogues are: --catalogs DIR or --vizier URL")
        if not self.preference:
            raise ValueError("prefer: name at least one label source")
        return self


class OptimConfig(Config):
    """What both trainings share."""

    batch_size: int = Field(default=64, ge=1)
    """Images (pretraining) or clusters (training) per step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate of AdamW, one-cycle schedule."""
    weight_decay: float = Field(default=1e-3, ge=0)
    """Weight decay of AdamW."""
    validation_share: float = Field(default=0.15, gt=0, lt=0.9)
    """Share of the training part kept aside to stop early and to choose the epoch."""
    patience: int = Field(default=8, ge=1)
    """Epochs without improvement on the validation share before training stops."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Device, passed through to Lightning."""


class PretrainConfig(OptimConfig):
    """Network 1: an encoder that learns to tell the band of a single-band image. No labels."""

    encoder: str = "small"
    """'small' (made for 2 cores) or any convolutional timm model, e.g. resnet18; built with in_chans=1."""
    gain_jitter: float = Field(default=0.2, ge=0)
    """Spread (ln) of a random gain on every training image, so that a band's noise level gives nothing away."""
    epochs: int = Field(default=6, ge=1)
    """Most passes over the images."""


class TrainConfig(OptimConfig):
    """Network 2: from the features of the bands to a mass, by k-fold cross-validation."""

    folds: int = Field(default=5, ge=2)
    """Number of folds."""
    fold_separation_deg: float = Field(default=0.5, ge=0)
    """Clusters closer than this on the sky share a fold."""
    freeze_encoder: bool = True
    """Keep network 1 as pretrained (the paper's recipe); its features are computed once."""
    from_scratch: bool = False
    """Start from random encoder weights: what pretraining is worth. Needs freeze_encoder = false."""
    use_redshift: bool = True
    """Give network 2 the redshift."""
    epochs: int = Field(default=30, ge=1)
    """Most passes over the labelled clusters, per fold."""
    views: int = Field(default=2, ge=1, le=8)
    """Rotated and mirrored views of each cluster: features are computed for each, predictions averaged over them."""
    edge_probability: float = Field(default=0.3, ge=0, le=1)
    """Share of training views with part of the image masked, as at the edge of a frame."""

    @model_validator(mode="after")
    def _scratch_trains(self) -> Self:
        if self.from_scratch and self.freeze_encoder:
            raise ValueError("from_scratch needs freeze_encoder = false: random frozen weights learn nothing")
        return self


class BaselineConfig(Config):
    """Masses from richness alone, by cross-validation: what every network is held against."""

    folds: int = Field(default=10, ge=2)
    """Number of folds."""
    fold_separation_deg: float = Field(default=0.5, ge=0)
    """Clusters closer than this on the sky share a fold."""
    repeats: int = Field(default=20, ge=1)
    """How often the folds are dealt anew; errors are means over these."""
    relation: Literal["fit", "scatter", "simet2017", "mcclintock2019", "rykoff2012"] = "fit"
    """Least squares ('fit'), with intrinsic scatter and errors on both axes ('scatter'), or a published relation."""
    concentration: Literal["diemer19", "duffy08", "bhattacharya13", "diemer15", "child18"] = "diemer19"
    """Concentration-mass relation that brings a published relation's masses to M500c."""


class ExplainConfig(Config):
    """Attribution maps."""

    n_clusters: int = Field(default=6, ge=1)
    """How many clusters to draw when no ids are given: spread over predicted mass."""
    steps: int = Field(default=32, ge=2)
    """Steps of the integral in integrated gradients."""


class DataConfig(Config):
    """Real data for `pix2mass run`: catalogues and the source of their images."""

    labelled: Path
    """Catalogue of clusters with masses."""
    unlabelled: Path
    """Catalogue of positions without masses, for pretraining."""
    frames: str | None = None
    """As `pix2mass build --frames`."""
    frame_index: Path | None = None
    """As `pix2mass build --frame-index`."""
    cutouts: str | None = None
    """As `pix2mass build --cutouts`."""


class RunConfig(Config):
    """A whole run, from images to report: what `pix2mass run CONFIG.toml` reads. Give [mock] or [data]."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run folder under runs/."""
    seed: int = Field(default=1, ge=0)
    """Seed of every random number of the run."""
    mock: MockConfig | None = None
    """Make a mock survey with known truth."""
    data: DataConfig | None = None
    """Use real observations."""
    grid: GridConfig = GridConfig()
    pretrain: PretrainConfig = PretrainConfig()
    train: TrainConfig = TrainConfig()
    explain: ExplainConfig = ExplainConfig()

    @model_validator(mode="after")
    def _mock_or_data(self) -> Self:
        if (self.mock is None) == (self.data is None):
            raise ValueError("give either a [mock] table or a [data] table")
        return self


C = TypeVar("C", bound=Config)


def _known_keys(config_class: type[Config], location: tuple[int | str, ...]) -> list[str]:
    """Field names at a location such as ('train', 'epohcs') of a nested config."""
    current: Any = config_class
    for key in location[:-1]:
        annotation = current.model_fields[str(key)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next(c for c in candidates if isinstance(c, type) and issubclass(c, Config))
    return list(current.model_fields)


def validate(config_class: type[C], values: dict[str, Any], where: str) -> C:
    """Make a config from plain values.

    Raises:
        Pix2massError: lists every wrong key and value at once, with ``where`` they stand and the nearest right key.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            location = ".".join(str(part) for part in problem["loc"]) or "(whole)"
            if problem["type"] == "extra_forbidden":
                known = _known_keys(config_class, problem["loc"])
                near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
                advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
                lines.append(f"  {location}: unknown key; {advice}")
            else:
                shown = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r}"
                lines.append(f"  {location}: {problem['msg'].removeprefix('Value error, ')}{shown}")
        raise Pix2massError(f"{where}: the configuration is not valid\n" + "\n".join(lines)) from None


def load_toml(config_class: type[C], path: Path) -> C:
    """Read a config from a TOML file.

    Raises:
        Pix2massError: the file is missing, is not TOML, or does not fit the config.
    """
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise Pix2massError(f"{path}: {(error.strerror or '').lower()}; expected a TOML configuration") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Pix2massError(f"{path}: not a TOML file: {error}") from None
    return validate(config_class, values, str(path))


def to_toml(config: Config) -> str:
    """The config as TOML; ``None`` values are left out, since TOML has no null."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
