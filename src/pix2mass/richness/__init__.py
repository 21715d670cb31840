"""Red-sequence richness lambda of a galaxy catalogue, and the mass it predicts: the baseline that stands beside the
network.

The matched filter of Rykoff et al. 2012, ApJ 746, 178, and 2014, ApJ 785, 104: lambda is the number of red galaxies
brighter than 0.2 L* within R_c, each counted by the probability that position, magnitude and colours make it a
member. Radii in this definition carry H0 = 100; all lengths here are proper Mpc of H0 = 70. One code measures mock
and real catalogues.

``red_sequence``: what colours members have; ``background``: what else is on the sky; ``filter``: lambda of one cluster
or many; ``relation``: from lambda to mass.
"""

from pix2mass.cosmology import m_star_i_mag
from pix2mass.richness.background import BACKGROUND_Z, CHI2_MAX, Background
from pix2mass.richness.filter import (
    LUMINOUS_MAG,
    Covered,
    RichnessResult,
    SkyIndex,
    calibrate,
    measure,
    radius_mpc,
    red_sequence_count,
    richness,
    separation_arcsec,
    ten_sigma_depth_mag,
)
from pix2mass.richness.red_sequence import (
    COLOURS,
    GALAXIES,
    RedSequence,
    colours_of,
    reference_mag,
    reference_mag_err,
)
from pix2mass.richness.relation import (
    PUBLISHED,
    RICHNESS_FLOOR,
    BaselineScores,
    PublishedRelation,
    RichnessMassRelation,
    ScatterRelation,
    cross_validate,
    richness_mass_fit,
    richness_mass_fit_with_scatter,
)

__all__ = [
    "BACKGROUND_Z",
    "CHI2_MAX",
    "COLOURS",
    "GALAXIES",
    "LUMINOUS_MAG",
    "PUBLISHED",
    "RICHNESS_FLOOR",
    "Background",
    "BaselineScores",
    "Covered",
    "PublishedRelation",
    "RedSequence",
    "RichnessMassRelation",
    "RichnessResult",
    "ScatterRelation",
    "SkyIndex",
    "calibrate",
    "colours_of",
    "cross_validate",
    "m_star_i_mag",
    "measure",
    "radius_mpc",
    "red_sequence_count",
    "reference_mag",
    "reference_mag_err",
    "richness",
    "richness_mass_fit",
    "richness_mass_fit_with_scatter",
    "separation_arcsec",
    "ten_sigma_depth_mag",
]
