"""Cluster catalogues: one checked table whatever the file; published tables, matched, with masses on one scale; folds.

``labels.build`` makes the labelled and the unlabelled table of published ones; ``read_catalog`` reads a finished table.
"""

from pix2mass.catalog.folds import sky_folds as sky_folds
from pix2mass.catalog.match import match_one_to_one as match_one_to_one
from pix2mass.catalog.published import read_published as read_published
from pix2mass.catalog.table import check_catalog as check_catalog
from pix2mass.catalog.table import read_catalog as read_catalog
from pix2mass.catalog.table import write_catalog as write_catalog
