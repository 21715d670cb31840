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

PUBLIC_ARCHIVE = "https://data.sdss.org/sas"
"""The SDSS Science Archive Server, public and free."""


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


PerBand = tuple[float, float, float, float, float]
"""One value per band, u, g, r, i, z."""

PerColour = tuple[float, float, float, float]
"""One value per colour, u-g, g-r, r-i, i-z."""


class PhysicsConfig(Config):
    """The physics of the mock sky, its camera and its photometric catalogue; the defaults are the configuration `sky`.

    Masses are M500c in Msun, lengths proper kpc, H0 = 70, magnitudes SDSS ugriz free of Galactic extinction.
    """

    # Clusters.
    richness_at_pivot: float = Field(default=40.0, gt=0)
    """Median richness lambda at 10^14.24 Msun: Simet et al. 2017, MNRAS 466, 3103 (M200m = 10^14.37 Msun/h at lambda
    40, M500c = 0.53 M200m), and the MCXC masses of redMaPPer clusters (10^14.238)."""
    richness_slope: float = Field(default=1.0, gt=0)
    """Power of mass in the median richness: Murata et al. 2018, ApJ 854, 120 (0.99); Simet et al. 2017 have 0.75, Saro
    et al. 2015, MNRAS 454, 2305, have 1.14."""
    richness_scatter_ln: float = Field(default=0.22, ge=0)
    """Lognormal scatter of richness at fixed mass, beside Poisson noise: 0.2-0.25, Rykoff et al. 2014, ApJ 785, 104,
    and Rozo & Rykoff 2014, ApJ 783, 80."""
    galaxy_concentration: float = Field(default=5.0, gt=0)
    """c200 of the galaxies of clusters: between 3-4 of all galaxies (Lin et al. 2004, ApJ 610, 745) and about 6 of red
    ones (the 0.15 Mpc/h scale radius of Rykoff et al. 2012, ApJ 746, 178)."""
    member_radius_r200c: float = Field(default=2.0, gt=0)
    """Members are drawn to this projected radius over R200c; beyond it the correlated groups take over. A choice."""
    red_fraction_centre: float = Field(default=0.88, gt=0, le=1)
    """Red fraction of luminous members at the centre: Hansen et al. 2009, ApJ 699, 1333."""
    red_fraction_outskirts: float = Field(default=0.45, gt=0, le=1)
    """Red fraction of luminous members at R200c and beyond, linear in radius between: Hansen et al. 2009."""
    red_alpha: float = Field(default=-1.0, gt=-2, lt=1)
    """Faint-end slope of red members: Rykoff et al. 2014."""
    blue_alpha: float = Field(default=-1.2, gt=-2, lt=1)
    """Faint-end slope of blue members: steeper than of red ones, Popesso et al. 2006, A&A 445, 29."""
    m_star_offset_mag: float = Field(default=0.0, ge=-1, le=1)
    """m* of red members in i minus that of Rykoff et al. 2012, equation 9: none, theirs was measured in SDSS."""
    blue_fainter_mag: float = 0.4
    """m* of blue members in i minus that of red ones: their stars weigh less (Hansen et al. 2009)."""
    brightest_mag: float = -1.5
    """i - m* of the brightest galaxy at 10^14.24 Msun: measured on the redMaPPer DR8 centrals, -1.19, -1.32, -1.54,
    -1.74 at lambda 10-20, 20-30, 30-50, 50-100."""
    brightest_slope_mag: float = -0.82
    """Its change per dex of mass: from the same centrals."""
    brightest_scatter_mag: float = Field(default=0.35, ge=0)
    """Its scatter: from the same centrals, 0.4 with the scatter of richness in it."""
    brightest_size_factor: float = Field(default=1.2, gt=0)
    """Size of brightest galaxies over that of others of their luminosity: larger, Bernardi et al. 2007, AJ 133, 1741;
    how much was set on the flux errors of the DR8 centrals, which follow sizes."""
    diffuse_light_share: float = Field(default=0.3, ge=0)
    """Diffuse intracluster light as a fraction of the brightest galaxy's: order of magnitude of Zhang et al. 2019, ApJ
    874, 165."""
    diffuse_light_r50_kpc: float = Field(default=100.0, gt=0)
    """Half-light radius of the diffuse light: order of magnitude of Zhang et al. 2019."""

    # Structure along the line of sight.
    halo_mass_offset_dex: float = -0.15
    """From masses of simulated haloes to the project's X-ray and SZ scale, 0.1-0.15 dex below weak lensing. With it
    clusters richer than 60 at z 0.1-0.35 are as many as in redMaPPer v5.10 (0.060 to 0.057 per deg2)."""
    correlated_structure: float = Field(default=1.0, ge=0)
    """Factor on the excess of groups around a cluster, b_c b_g xi (two-halo term); 1 is linear theory with the biases
    of Tinker et al. 2010, ApJ 724, 878; 0 switches it off."""

    # Field galaxies.
    field_red_lf: tuple[float, float, float, float] = (-20.34, -0.57, 1.11e-2, 0.8)
    """Red field galaxies: M* - 5 log h in r at z = 0.1, alpha, phi* (h^3 Mpc^-3), brightening in magnitudes per unit z:
    Loveday et al. 2012, MNRAS 420, 1239; the last near their Q."""
    field_blue_lf: tuple[float, float, float, float] = (-20.45, -1.49, 0.38e-2, 1.4)
    """The same of blue field galaxies; the last between the Q of Loveday et al. 2012 and that of Blanton et al. 2003,
    ApJ 592, 819."""
    field_red_scale: float = Field(default=0.76, ge=0)
    """Factor on phi* of red field galaxies, since groups hold the rest: set on the counts and colours of the DR8
    field."""
    field_blue_scale: float = Field(default=0.96, ge=0)
    """Factor on phi* of blue field galaxies: set on the counts and colours of the DR8 field."""

    # Colours.
    red_colour_offset_mag: PerColour = (0.135, -0.028, 0.009, -0.029)
    """Observed minus template colour of an m* galaxy of the red sequence at z 0.1-0.3 (kcorrect's luminous red galaxy):
    measured on the redMaPPer DR8 training galaxies with P > 0.8 and central galaxies."""
    red_colour_slope: PerColour = (-0.04, -0.030, -0.0075, -0.005)
    """Change of each colour per magnitude of i - m*(z): the difference between those two samples over 1.85 mag."""
    red_colour_scatter_mag: PerColour = (0.16, 0.053, 0.024, 0.0227)
    """Intrinsic scatter of red satellites, set so that mock galaxies under the cut P > 0.8 scatter as the DR8 training
    galaxies do (0.042-0.050 in g-r, errors included). Maximum likelihood on those without a cut gives 0.115, 0.059,
    0.024, 0.023, with other galaxies on the red sequence counted in."""
    red_colour_correlation: tuple[float, float, float, float, float, float] = (0.52, 0.20, 0.18, 0.67, 0.44, 0.53)
    """Correlations of that scatter, of u-g with g-r, r-i, i-z, of g-r with r-i, i-z, of r-i with i-z: same fit."""
    central_colour_scatter_mag: tuple[PerColour, PerColour] = (
        (0.07, 0.027, 0.015, 0.023),
        (0.22, 0.041, 0.015, 0.025),
    )
    """Intrinsic scatter of brightest galaxies at z = 0.1 and at 0.25 and beyond, linear between: that of the DR8
    centrals less their photometric errors, in quadrature."""
    young_share_beta: tuple[float, float] = (2.2, 1.5)
    """Beta distribution of the share of young light of blue galaxies: set on the colours of the DR8 field."""
    blue_colour_scatter_mag: PerColour = (0.08, 0.04, 0.03, 0.03)
    """Scatter of the colours of blue galaxies about their template: set on the colours of the DR8 field."""
    blue_reddening_mag: float = Field(default=0.12, ge=0)
    """Scatter of internal reddening E(B-V) of blue galaxies, half of a normal distribution: set on the DR8 field."""

    # Field galaxies too faint for catalogues, in pictures.
    background_growth: float = Field(default=1.3, ge=0)
    """Growth P of the number of blue field galaxies beyond z = 0.3, as 10^(0.4 P (z - 0.3)), from r = 22 on: set on the
    sources of 3 to 5 times the noise in six SDSS frames; Lin et al. 1999, ApJ 518, 533, have P = 3 for late types."""
    background_young_growth: float = Field(default=4.0, ge=0)
    """Growth of their share of young light: that of old light is raised to the power 1 + this (z - 0.3). Star formation
    was stronger; set on the g-r of faint sources in the same frames."""

    # Shapes.
    early_r50_scale: float = Field(default=1.0, gt=0)
    """Factor on the half-light radii of red galaxies of Shen et al. 2003, MNRAS 343, 978, equation 14."""
    late_r50_scale: float = Field(default=1.0, gt=0)
    """Factor on the half-light radii of blue galaxies of Shen et al. 2003, equation 15."""
    disk_thickness: float = Field(default=0.2, gt=0, le=1)
    """Axis ratio of a disk seen edge-on: Unterborn & Ryden 2008, ApJ 687, 976, have about 0.2."""

    # Stars.
    star_count_r145: float = Field(default=86.0, ge=0)
    """Stars per deg2 and magnitude at r = 14.5: peaks of r 15-18 in six SDSS frames at Galactic latitudes 46 to 78."""
    star_count_slope: float = Field(default=0.17, gt=0)
    """Their log10 slope per magnitude beyond r = 14: photoObj 94-1-0012."""
    star_count_bright_slope: float = Field(default=0.30, gt=0)
    """The same for brighter stars, down to r = 9: near 0.35 of a disk of one scale height; the six frames hold about as
    many saturated stars."""
    star_count_scatter_ln: float = Field(default=0.35, ge=0)
    """Scatter of the number of stars from place to place: stands for other Galactic latitudes. A choice."""

    # Camera.
    pixel_sigma_min_nmgy: PerBand = (0.037, 0.0144, 0.023, 0.037, 0.140)
    """Lowest scatter of native 0.396" pixels per band, drawn flat in its log: half the robust scatter of sums of two by
    two pixels in six SDSS frames, which whole counts disturb less than that of single pixels."""
    pixel_sigma_max_nmgy: PerBand = (0.052, 0.0236, 0.032, 0.057, 0.224)
    """Highest scatter of native pixels per band: the same frames."""
    saturation_nmgy: PerBand = (300.0, 130.0, 130.0, 140.0, 800.0)
    """Largest value of a native pixel per band: the order of the brightest in the same frames."""
    nmgy_per_electron: PerBand = (0.0055, 0.0010, 0.0011, 0.0012, 0.0075)
    """Calibration over gain: a source of f nanomaggies has a Poisson variance of f times this. Calibration vectors of
    the same frames and gains of photoField 94-1."""
    psf_fwhm_arcsec: PerBand = (1.5, 1.4, 1.3, 1.2, 1.2)
    """Median seeing of SDSS imaging: Ross et al. 2011, MNRAS 417, 1350, and the SDSS DR7 site (1.32" in r)."""
    psf_scatter_ln: float = Field(default=0.10, ge=0)
    """Scatter of the seeing from image to image, common to the bands: drift scans see them within minutes."""
    psf_band_scatter_ln: float = Field(default=0.03, ge=0)
    """Scatter of the seeing of each band by itself."""
    psf_components: tuple[tuple[float, float], ...] = (
        (0.68, 1.0),
        (0.235, 2.0),
        (0.05, 4.5),
        (0.012, 10.0),
        (0.023, 24.0),
    )
    """Gaussians of the PSF: share of the light and width over that of the first. Fit to median profiles of stars in six
    SDSS frames, to 30" from the centre; the brightest, scaled to the others at 3" to 5", give the wings. The widest
    Gaussian holds 0.015 of the light in g, 0.04 in i; one PSF stands for all bands."""
    sky_offset_sigma: float = 0.012
    """Mean residual sky level over the native pixel noise: what the medians of 50" squares in six SDSS frames have
    beyond the light of the sources."""
    sky_residual_sigma: float = Field(default=0.03, ge=0)
    """Scatter of the residual sky level, and of its change from the centre to an edge, over the native pixel noise:
    from the scatter of the same medians."""

    # Photometric catalogue.
    photometry_error_factor: PerBand = (1.46, 1.36, 1.54, 1.54, 1.56)
    """Errors of model fluxes over those of a perfect fit in this camera's noise: medians of the DR8 field, its
    extinction taken out, raised in u, g and z as the range of the pixel noise was lowered; the ratio is the same within
    10% from i = 17.5 to 20.5."""
    photometry_error_scatter_ln: float = Field(default=0.12, ge=0)
    """Scatter of those errors, common to the bands, beside that of the sizes: what is left in the DR8 field."""
    blend_arcsec: float = Field(default=2.1, ge=0)
    """Sources closer than this are one source. Pairs of galaxies with i < 20.5 in the DR8 field are 0.0, 0.2, 0.3, 0.55
    of those of random positions at 0-1, 1-1.5, 1.5-2, 2-2.5 arcsec, about 1.0 beyond: as many are missing."""
    completeness_i_mag: float = 20.98
    """Observed i, extinction included, at which half of the galaxies are listed: counts of the DR8 field (0.15 mag of
    extinction) over those of the mock sky are 0.98, 0.86, 0.40 at dereddened i 20.25-20.5-20.75-21."""
    completeness_width_mag: float = Field(default=0.19, gt=0)
    """Width (standard deviation) of that fall: the same counts."""
    star_as_galaxy_share: float = Field(default=0.05, ge=0, le=1)
    """Share of stars with r > 20 that are listed as galaxies: Stoughton et al. 2002, AJ 123, 485 (right for 95% at r
    21)."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if any(low > high for low, high in zip(self.pixel_sigma_min_nmgy, self.pixel_sigma_max_nmgy, strict=True)):
            raise ValueError("pixel_sigma_min_nmgy must not exceed pixel_sigma_max_nmgy in any band")
        if not self.psf_components or abs(sum(share for share, _ in self.psf_components) - 1) > 1e-6:
            raise ValueError("psf_components: the shares of the light must add up to 1")
        return self


PHYSICS: dict[str, dict[str, Any]] = {
    "sky": {},
    "sim": {
        # Clusters. Amplitude between Simet et al. 2017 (40) and Saro et al. 2015 and Murata et al. 2018 (about 20 at
        # this mass), slope of Saro et al.; scatter between Saro et al. (0.2) and Murata et al. (0.46).
        "richness_at_pivot": 30.0,
        "richness_slope": 1.14,
        "richness_scatter_ln": 0.30,
        # All galaxies of clusters, not the red ones alone: Lin et al. 2004; Hennig et al. 2017, MNRAS 467, 4015.
        "galaxy_concentration": 3.5,
        # Fewer red galaxies, as in Hennig et al. 2017 (0.68 within R200c).
        "red_fraction_centre": 0.78,
        "red_fraction_outskirts": 0.38,
        # Luminosity functions: fewer faint red galaxies (Zenteno et al. 2016, MNRAS 462, 830, and the decline found
        # with redshift by Rudnick et al. 2009, ApJ 700, 1559), more faint blue ones (Popesso et al. 2006), m* within
        # the 0.1-0.2 mag by which evolution models and zero points of the literature differ.
        "red_alpha": -0.8,
        "blue_alpha": -1.4,
        "m_star_offset_mag": 0.15,
        "blue_fainter_mag": 0.2,
        # Light of the brightest galaxy rising as M^0.25: Lin & Mohr 2004, ApJ 617, 879; more diffuse light: Gonzalez
        # et al. 2013, ApJ 778, 14.
        "brightest_slope_mag": -0.62,
        "brightest_scatter_mag": 0.30,
        "diffuse_light_share": 0.5,
        "diffuse_light_r50_kpc": 150.0,
        "brightest_size_factor": 1.5,
        "halo_mass_offset_dex": -0.10,
        # Field: slopes and evolution at the other end of the published range; Blanton et al. 2003 has alpha -1.05 and
        # Q 1.62 for all galaxies.
        "field_red_lf": (-20.46, -0.75, 0.95e-2, 1.1),
        "field_blue_lf": (-20.30, -1.35, 0.50e-2, 1.6),
        "field_red_scale": 0.70,
        "field_blue_scale": 0.90,
        # Red sequence: zero points differ by 0.02-0.05 mag between samples and calibrations (DR8 spectroscopic red
        # galaxies are bluer than the ridge by 0.04-0.08 in g-r, centrals redder by 0.05); scatter and slope as in
        # nearby rich clusters (Bower, Lucey & Ellis 1992, MNRAS 254, 601; Lopez-Cruz et al. 2004, ApJ 614, 679).
        "red_colour_offset_mag": (0.06, -0.068, -0.006, -0.014),
        "red_colour_slope": (-0.07, -0.022, -0.004, -0.002),
        "red_colour_scatter_mag": (0.09, 0.042, 0.016, 0.018),
        "central_colour_scatter_mag": ((0.08, 0.03, 0.012, 0.016), (0.08, 0.03, 0.012, 0.016)),
        "young_share_beta": (1.8, 1.6),
        # Camera: a noisier, blurrier half of the survey, and a PSF without the far wings (psField's double Gaussian).
        "pixel_sigma_min_nmgy": (0.046, 0.0178, 0.0264, 0.0425, 0.182),
        "pixel_sigma_max_nmgy": (0.061, 0.0276, 0.0368, 0.0655, 0.250),
        "psf_fwhm_arcsec": (1.65, 1.54, 1.43, 1.32, 1.32),
        "psf_components": ((0.8, 1.0), (0.2, 2.2)),
        "sky_residual_sigma": 0.04,
    },
}
"""Two named configurations of the physics: `sky` is the defaults, matched to SDSS; `sim` departs from them by as much
as the literature disagrees."""


class MockConfig(Config):
    """The mock survey: how many clusters, over which masses and redshifts, seen how well, with which physics."""

    n_labelled: int = Field(default=800, ge=20)
    """Clusters with a mass label."""
    n_unlabelled: int = Field(default=1200, ge=20)
    """Clusters without a label, for pretraining."""
    mass_prior: Literal["flat", "mass function"] = "flat"
    """Masses and redshifts flat in log10 M and z, or from the halo mass function times comoving volume."""
    log10_m500c_min: float = Field(default=13.5, ge=13.0, le=15.5)
    """Lowest true mass."""
    log10_m500c_max: float = Field(default=15.2, ge=13.0, le=15.5)
    """Highest true mass."""
    z_min: float = Field(default=0.08, ge=0.05, le=0.55)
    """Lowest redshift."""
    z_max: float = Field(default=0.55, ge=0.05, le=0.55)
    """Highest redshift."""
    label_scatter_dex: float = Field(default=0.12, ge=0)
    """Gaussian measurement scatter of the mass labels: between the 0.1 and 0.15 of X-ray and SZ masses."""
    miscentred_share: float = Field(default=0.2, ge=0, le=1)
    """Share of clusters whose catalogued position is off the centre of the galaxies: about that of Zhang et al. 2019,
    MNRAS 487, 2578."""
    miscentring_kpc: float = Field(default=200.0, ge=0)
    """Rayleigh scale of that offset in proper kpc: of the order of Zhang et al. 2019."""
    depth_r_mag: float = Field(default=23.0, ge=18, le=23)
    """Faintest r magnitude of galaxies and stars that are drawn."""
    background_r_mag: float = Field(default=25.0, ge=23, le=25)
    """Faintest r magnitude of the field galaxies from r = 23 on that roughen the sky of pictures; 23 for none."""
    projected_groups: bool = True
    """Put part of the foreground and background galaxies, and of those around the cluster, into groups of their own."""
    ebv_min_mag: float = Field(default=0.02, ge=0)
    """Lowest Galactic reddening E(B-V); drawn flat per cluster and applied to the pixels."""
    ebv_max_mag: float = Field(default=0.06, ge=0)
    """Highest Galactic reddening E(B-V)."""
    configuration: Literal["sky", "sim"] = "sky"
    """Named physics: 'sky' matches SDSS, 'sim' departs from it by as much as the literature disagrees."""
    physics: PhysicsConfig = PhysicsConfig()
    """Single values of the physics in place of those of the named configuration."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_physics(cls, values: Any) -> Any:
        if not isinstance(values, dict) or isinstance(values.get("physics"), PhysicsConfig):
            return values
        named = PHYSICS.get(values.get("configuration", "sky"), {})
        return {**values, "physics": {**named, **(values.get("physics") or {})}}

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.log10_m500c_min >= self.log10_m500c_max or self.z_min >= self.z_max:
            raise ValueError("each _min must lie below its _max")
        if self.ebv_min_mag > self.ebv_max_mag:
            raise ValueError("ebv_min_mag must not exceed ebv_max_mag")
        return self


class BuildConfig(Config):
    """Images for a catalogue: where they come from. One source; the public SDSS archive if none is given."""

    frames: str | None = None
    """Folder or URL of SDSS frames in the archive's own layout (what stands before /dr12); the public archive,
    https://data.sdss.org/sas, where no source is given."""
    fields: Literal["auto", "list", "skyserver", "headers"] = "auto"
    """How the frames that cover a position are found: from the survey's list of fields (window_flist.fits, fetched
    once), from SkyServer (few positions), or from the frames' headers; auto takes the list where the archive has it."""
    frame_index: Path | None = None
    """Table of the frames that exist, as written by `pix2mass catalog frames`; takes the place of fields."""
    skyserver: str = "https://skyserver.sdss.org"
    """Base URL of SkyServer, for fields = skyserver."""
    frame_cache: Path = Path("frame-cache")
    """Folder for what comes over HTTP."""
    keep_frames: bool = False
    """Keep frames in that folder; otherwise each goes after its last use."""
    connections: int = Field(default=4, ge=1, le=16)
    """Most connections to the archive at a time, over all processes."""
    hips: bool = False
    """Images from the cutout service hips2fits of the CDS in place of frames: few bytes, but no noise and no PSF."""
    hips_service: str = "https://alasky.cds.unistra.fr/hips-image-services/hips2fits"
    """URL of that service."""
    cutouts: str | None = None
    """Pattern of your own FITS cutouts, e.g. 'DIR/{id}-{band}.fits'."""

    @model_validator(mode="before")
    @classmethod
    def _public_archive(cls, values: Any) -> Any:
        if isinstance(values, dict) and not any(values.get(name) for name in ("frames", "hips", "cutouts")):
            return {**values, "frames": PUBLIC_ARCHIVE}
        return values

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.frames is not None) + self.hips + (self.cutouts is not None) != 1:
            raise ValueError("give one source of images: --frames BASE, --hips or --cutouts 'DIR/{id}-{band}.fits'")
        return self

    def decides(self) -> dict[str, Any]:
        """The settings that decide what the pixels are, for a store's provenance; how they arrive is left out."""
        if self.cutouts is not None:
            names = {"cutouts"}
        elif self.hips:
            names = {"hips", "hips_service"}
        else:
            names = {"frames", "fields", "frame_index"}
        return self.model_dump(mode="json", include=names)


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
    devices: int = Field(default=1, ge=1)
    """Devices per machine, each with batches of its own (on the CPU: processes, of one thread each)."""
    num_nodes: int = Field(default=1, ge=1)
    """Machines that train together. The same command runs on each, with a run folder of its own on a disk that all
    share, and with MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment, as Lightning reads them."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    """Precision, passed through to Lightning: mixed ones are faster on GPUs."""

    @property
    def processes(self) -> int:
        """Processes that share a training."""
        return self.devices * self.num_nodes


class PretrainConfig(OptimConfig):
    """Network 1: an encoder of single-band images that learns without labels."""

    task: Literal["bands", "contrastive"] = "bands"
    """What it learns: 'bands', to tell the band of an image (the paper's); 'contrastive', to tell which two views show
    the same image."""
    units: Literal["noise", "l-star"] = "noise"
    """Units of the images, for both networks: 'noise', that of each image; 'l-star', the light of an L* red galaxy at
    the cluster's redshift, which makes galaxies of clusters look alike at all redshifts. Needs redshifts of all, and
    shows the depth of the images, which was tried on mock images of one depth alone."""
    encoder: str = "small"
    """'small' (made for 2 cores); any convolutional timm model, e.g. resnet18, built with in_chans=1; or your own as
    'module:function'."""
    gain_jitter: float = Field(default=0.2, ge=0)
    """Spread (ln) of a random gain on every training image, so that a band's noise level gives nothing away."""
    n_images: int | None = Field(default=None, ge=10)
    """Train on this many of the store's cutouts, chosen at random; on all if not given."""
    noise_jitter: float = Field(default=0.5, ge=0)
    """Noise added to the views of the contrastive task, in units of the image's own."""
    epochs: int = Field(default=6, ge=1)
    """Most passes over the images."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.task == "contrastive" and self.units != "noise":
            raise ValueError("task = 'contrastive' needs units = 'noise': noise is added to its views")
        return self


_COUNTS = ("folds", "fold_separation_deg", "network", "use_redshift")
"""Settings of TrainConfig that count for networks of all kinds."""
_COUNTS_FOR_GALAXIES = ("start_from", "ensemble_size")


class TrainConfig(OptimConfig):
    """Network 2: from the features of the bands to a mass, by k-fold cross-validation."""

    folds: int = Field(default=5, ge=2)
    """Number of folds."""
    fold_separation_deg: float = Field(default=0.5, ge=0)
    """Clusters closer than this on the sky share a fold."""
    network: Literal["bands", "gaussian-process", "galaxies"] = "bands"
    """'bands': features of each band by itself, from network 1 (the paper's way), and a network on them.
    'gaussian-process': the same features, kept as they are, and a Gaussian process on their means and peaks in rings.
    'galaxies': sources of the image are weighed and counted; needs no network 1. The last two need the redshift, and
    have no use for the settings here but folds and fold_separation_deg; 'galaxies' also takes start_from and
    ensemble_size. Any other is refused with them."""
    ensemble_size: int = Field(default=1, ge=1)
    """Networks of galaxies trained from different first weights, whose mean is the mass; with start_from there are as
    many as that run has. The image is described once for all of them."""
    start_from: Path | None = None
    """Run folder, or name of packaged weights (default, default-gri), whose first network 2 the training starts from,
    scaler included: fine-tuning, say after training on mock clusters. A network of bands goes on learning (give a lower
    learning rate); of one of galaxies the masses are corrected, the weights stay."""
    freeze_encoder: bool = True
    """Keep the features as they are and train the rest: of network 1 as pretrained (the paper's recipe), or of the
    network of start_from. They are computed once."""
    from_scratch: bool = False
    """Start from random encoder weights, of the run's network 1 or, without one, of the small encoder: what pretraining
    is worth. Needs freeze_encoder = false."""
    use_redshift: bool = True
    """Give network 2 the redshift."""
    epochs: int = Field(default=30, ge=1)
    """Most passes over the labelled clusters, per fold."""
    views: int = Field(default=2, ge=1, le=8)
    """Rotated and mirrored views of each cluster: frozen features are computed for each, predictions averaged over
    them. Features that are trained see all eight."""
    shift_pixels: int = Field(default=0, ge=0)
    """Largest shift of training images in each direction, where features are trained."""
    edge_probability: float = Field(default=0.3, ge=0, le=1)
    """Share of training views with part of the image masked, as at the edge of a frame."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.from_scratch and self.freeze_encoder:
            raise ValueError("from_scratch needs freeze_encoder = false: random frozen weights learn nothing")
        if self.from_scratch and self.start_from is not None:
            raise ValueError("give either from_scratch or start_from")
        if self.ensemble_size > 1 and self.network != "galaxies":
            raise ValueError(f"ensemble_size is for network = 'galaxies', this one is {self.network!r}")
        if self.network != "bands" and not self.use_redshift:
            raise ValueError(f"network = {self.network!r} needs use_redshift")
        if self.network != "bands":
            counts = {*_COUNTS, *(_COUNTS_FOR_GALAXIES if self.network == "galaxies" else ())}
            fields = TrainConfig.model_fields.items()
            ignored = [name for name, field in fields if name not in counts and getattr(self, name) != field.default]
            if ignored:
                raise ValueError(f"network = {self.network!r} has no use for {', '.join(ignored)}: leave that out")
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
    """How many clusters to draw when no ids are given."""
    steps: int = Field(default=64, ge=1)
    """Gradients taken along the integral in integrated gradients, per network, shared by the draws of blank sky."""
    compare: bool = False
    """Also make the maps of other methods: gradient, SmoothGrad, occlusion. Takes several times longer."""


class DataConfig(BuildConfig):
    """Real data for `pix2mass run`: catalogues, and the source of their images as `pix2mass build` takes it."""

    labelled: Path
    """Catalogue of clusters with masses."""
    unlabelled: Path
    """Catalogue of positions without masses, for pretraining."""


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
