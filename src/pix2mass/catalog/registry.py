"""The published catalogues that are known: their papers, their layouts, and what their masses are.

Each catalogue is a row of :data:`CATALOGUES`; each layout in which it is found is a :class:`Form`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pix2mass.catalog.masses import MassDefinition
from pix2mass.types import Pix2massError

DERIVED, PUBLISHED, ON_VIZIER, OWN = "derived", "published", "vizier", "own"

MASS_UNIT = "1e14 Msun"


@dataclass(frozen=True)
class Field:
    """One column of a published table.

    Attributes:
        names: the names it has in the releases of the table, in order of preference; case does not matter.
        unit: its unit, "" if it has none.
        required: whether the table is of no use without it.
        missing: values that stand for "not known"; everything that is not finite is missing too.
    """

    names: tuple[str, ...]
    unit: str = ""
    required: bool = True
    missing: tuple[float, ...] = ()


@dataclass(frozen=True)
class Form:
    """One layout of a catalogue.

    Attributes:
        kind: PUBLISHED, ON_VIZIER or DERIVED (made from the published one by others, with columns or precision lost).
        fields: our name -> the column.
        tells: columns that, all present, tell this form from any other.
        units_in_file: the published file states the units of its positions and masses; one without them is refused.
        note: what to know about this form.
    """

    kind: str
    fields: Mapping[str, Field]
    tells: tuple[str, ...]
    units_in_file: bool = False
    note: str = ""


@dataclass(frozen=True)
class Catalogue:
    """A published catalogue.

    Attributes:
        key: our name for it in configs, e.g. "mcxc".
        source: what stands in label_source.
        reference: the paper.
        forms: its layouts, most specific first.
        vizier: identifier of its table on VizieR.
        definition: what its masses are; None if it has no masses.
        position_err_arcmin: error of its positions where the table gives none per row.
        note: what to know about its masses.
    """

    key: str
    source: str
    reference: str
    forms: tuple[Form, ...]
    vizier: str
    definition: MassDefinition | None = None
    position_err_arcmin: float = 0.0
    note: str = ""


_M500C_1E14 = MassDefinition("500c", unit_msun=1e14)
_RA = Field(("RAdeg", "RA_ICRS", "RAJ2000", "_RA"), "deg")
_DEC = Field(("DEdeg", "DE_ICRS", "DEJ2000", "_DE"), "deg")
_XRAY = {
    "id": Field(("MCXC",)),
    "ra_deg": _RA,
    "dec_deg": _DEC,
    "z": Field(("z",)),
    "mass": Field(("M500",), MASS_UNIT),
    "mass_err_up": Field(("E_M500",), MASS_UNIT, required=False),
    "mass_err_low": Field(("e_M500",), MASS_UNIT, required=False),
    "r500_mpc": Field(("R500",), "Mpc", required=False),
    "other_name": Field(("OName",), required=False),
}
_REDMAPPER_PUBLISHED = {
    "id": Field(("NAME",)),
    "ra_deg": Field(("RA",), "deg"),
    "dec_deg": Field(("DEC",), "deg"),
    "z": Field(("Z_LAMBDA",)),
    "z_err": Field(("Z_LAMBDA_ERR", "Z_LAMBDA_E"), required=False),
    "richness": Field(("LAMBDA", "LAMBDA_CHISQ")),
    "richness_err": Field(("LAMBDA_ERR", "LAMBDA_E", "LAMBDA_CHISQ_E"), required=False),
    "z_spec": Field(("Z_SPEC", "BCG_SPEC_Z"), required=False, missing=(-1.0,)),
    "ebv": Field(("EBV_MEAN", "EBV"), required=False),
}

CATALOGUES = (
    Catalogue(
        "redmapper",
        "redMaPPer-DR8",
        "Rykoff et al. 2014, ApJ 785, 104; v6.3: Rykoff et al. 2016, ApJS 224, 1",
        (
            Form(PUBLISHED, _REDMAPPER_PUBLISHED, ("NAME", "Z_LAMBDA", "LAMBDA", "Z_SPEC")),
            Form(
                ON_VIZIER,
                {
                    "id": Field(("Name",)),
                    "ra_deg": _RA,
                    "dec_deg": _DEC,
                    "z": Field(("zlambda",)),
                    "z_err": Field(("e_zlambda",), required=False),
                    "richness": Field(("lambda",)),
                    "richness_err": Field(("e_lambda",), required=False),
                    "z_spec": Field(("zspec",), required=False, missing=(-1.0,)),
                },
                ("Name", "zlambda", "lambda"),
                units_in_file=True,
            ),
            Form(
                DERIVED,
                {
                    "id": Field(("name",)),
                    "ra_deg": Field(("RA",), "deg"),
                    "dec_deg": Field(("dec",), "deg"),
                    "z": Field(("redshift",)),
                    "richness": Field(("lambda",)),
                },
                ("name", "redshift", "lambda", "r500"),
                note="derived from the v5.10 table: no errors and no spectroscopic redshifts; r500 is a function of "
                "lambda and is not read",
            ),
        ),
        "J/ApJ/785/104/table1",
    ),
    Catalogue(
        "mcxc-ii",
        "MCXC-II",
        "Sadibekova et al. 2024, A&A 688, A187",
        (Form(ON_VIZIER, _XRAY, ("MCXC", "M500", "E_M500", "zType")),),
        "J/A+A/688/A187/mcxcii",
        _M500C_1E14,
        note="from X-ray luminosity; errors of the flux alone, without the scatter of mass at fixed luminosity",
    ),
    Catalogue(
        "mcxc",
        "MCXC",
        "Piffaretti et al. 2011, A&A 534, A109",
        (Form(PUBLISHED, _XRAY, ("MCXC", "M500", "L500", "OName"), units_in_file=True),),
        "J/A+A/534/A109/mcxc",
        _M500C_1E14,
        note="from X-ray luminosity; no errors are published",
    ),
    Catalogue(
        "psz2",
        "PSZ2",
        "Planck Collaboration 2016, A&A 594, A27",
        (
            Form(
                PUBLISHED,
                {
                    "id": Field(("NAME",)),
                    "ra_deg": Field(("RA",), "deg"),
                    "dec_deg": Field(("DEC",), "deg"),
                    "z": Field(("REDSHIFT",), missing=(-1.0,)),
                    "mass": Field(("MSZ",), MASS_UNIT, missing=(0.0,)),
                    "mass_err_up": Field(("MSZ_ERR_UP",), MASS_UNIT, missing=(0.0,)),
                    "mass_err_low": Field(("MSZ_ERR_LOW",), MASS_UNIT, missing=(0.0,)),
                    "position_err_arcmin": Field(("POS_ERR",), "arcmin"),
                    "name_redmapper": Field(("REDMAPPER",), required=False),
                    "name_mcxc": Field(("MCXC",), required=False),
                    "name_act": Field(("ACT",), required=False),
                },
                ("NAME", "MSZ", "REDSHIFT", "POS_ERR"),
                units_in_file=True,
            ),
            Form(
                ON_VIZIER,
                {
                    "id": Field(("PSZ2", "Name")),
                    "ra_deg": _RA,
                    "dec_deg": _DEC,
                    "z": Field(("z",), missing=(-1.0,)),
                    "mass": Field(("MSZ",), MASS_UNIT, missing=(0.0,)),
                    "mass_err_up": Field(("E_MSZ",), MASS_UNIT, required=False, missing=(0.0,)),
                    "mass_err_low": Field(("e_MSZ",), MASS_UNIT, required=False, missing=(0.0,)),
                    "position_err_arcmin": Field(("ePos", "errPos", "PosErr", "e_Pos"), "arcmin", required=False),
                    "name_redmapper": Field(("redMaPPer", "RedMapper"), required=False),
                    "name_mcxc": Field(("MCXC",), required=False),
                    "name_act": Field(("ACT",), required=False),
                },
                ("MSZ", "SNR"),
                units_in_file=True,
            ),
        ),
        "J/A+A/594/A27/psz2",
        _M500C_1E14,
        position_err_arcmin=5.0,
        note="from the SZ signal through an X-ray calibrated scaling relation, hydrostatic scale, no bias correction",
    ),
    Catalogue(
        "act-dr5",
        "ACT-DR5",
        "Hilton et al. 2021, ApJS 253, 3",
        (
            Form(
                PUBLISHED,
                {
                    "id": Field(("name",)),
                    "ra_deg": Field(("RADeg",), "deg"),
                    "dec_deg": Field(("decDeg",), "deg"),
                    "z": Field(("redshift",)),
                    "z_err": Field(("redshiftErr",), required=False, missing=(0.0,)),
                    "mass": Field(("M500c",), MASS_UNIT),
                    "mass_err_up": Field(("M500c_errPlus",), MASS_UNIT),
                    "mass_err_low": Field(("M500c_errMinus",), MASS_UNIT),
                    "richness": Field(("RM_LAMBDA",), required=False, missing=(0.0,)),
                    "richness_err": Field(("RM_LAMBDA_ERR",), required=False, missing=(0.0,)),
                },
                ("name", "RADeg", "decDeg", "M500c", "M500c_errPlus"),
            ),
            Form(
                ON_VIZIER,
                {
                    "id": Field(("ACT-CL", "ACT", "Name", "ACT_CL")),
                    "ra_deg": _RA,
                    "dec_deg": _DEC,
                    "z": Field(("z", "zspec")),
                    "z_err": Field(("e_z",), required=False),
                    "mass": Field(("M500c", "M500"), MASS_UNIT),
                    "mass_err_up": Field(("E_M500c", "E_M500"), MASS_UNIT, required=False),
                    "mass_err_low": Field(("e_M500c", "e_M500"), MASS_UNIT, required=False),
                },
                ("M500c", "SNR", "z"),
                units_in_file=True,
            ),
            Form(
                DERIVED,
                {
                    "id": Field(("name",)),
                    "ra_deg": Field(("ra_deg",), "deg"),
                    "dec_deg": Field(("dec_deg",), "deg"),
                    "z": Field(("z",)),
                    "mass": Field(("M500c_1e14",), MASS_UNIT),
                },
                ("name", "ra_deg", "dec_deg", "M500c_1e14"),
                note="derived: masses recovered from the R500 of a compilation, without errors",
            ),
        ),
        "J/ApJS/253/3/clusters",
        _M500C_1E14,
        note="from the SZ signal through the X-ray calibrated relation of Arnaud et al. 2010, corrected for selection; "
        "the column rescaled to weak lensing (M500cCal) is not used",
    ),
    Catalogue(
        "spiders",
        "SPIDERS",
        "Clerc et al. 2020, MNRAS 497, 3976; Kirkpatrick et al. 2021, MNRAS 503, 5763",
        (
            Form(
                PUBLISHED,
                {
                    "id": Field(("CLUS_ID",)),
                    "ra_deg": Field(("RA_OPT",), "deg"),
                    "dec_deg": Field(("DEC_OPT",), "deg"),
                    "z": Field(("SCREEN_CLUZSPEC",)),
                    "z_err": Field(("SCREEN_CLUZSPEC_ERR",), required=False),
                    "richness": Field(("LAMBDA_CHISQ_OPT",)),
                },
                ("CLUS_ID", "SCREEN_CLUZSPEC", "LAMBDA_CHISQ_OPT", "R200C_DEG"),
                units_in_file=True,
            ),
            Form(
                ON_VIZIER,
                {
                    "id": Field(("ClusID", "ID", "CLUSID", "Cluster", "SPIDERS")),
                    "ra_deg": _RA,
                    "dec_deg": _DEC,
                    "z": Field(("zspec", "z", "Clusz")),
                    "z_err": Field(("e_zspec", "e_z"), required=False),
                    "richness": Field(("lambda", "Lambda", "lambdaOpt")),
                },
                ("CODEX", "lambda"),
                units_in_file=True,
            ),
        ),
        "J/MNRAS/503/5763",
        note="no masses: its R200c follows from the X-ray luminosity and is not a label",
    ),
)
"""The catalogues that are known, in the order in which a file is held against them."""


def catalogue(key: str) -> Catalogue:
    """The catalogue of a given name.

    Raises:
        Pix2massError: there is none.
    """
    for one in CATALOGUES:
        if one.key == key.lower() or one.source.lower() == key.lower():
            return one
    known = ", ".join(one.key for one in CATALOGUES)
    raise Pix2massError(f"{key!r} is no known catalogue; expected one of {known}, or the path of a file")
