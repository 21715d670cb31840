"""Cluster catalogues: one checked table whatever the file, published tables read and matched, masses on one scale, folds.

``build`` makes the labelled and the unlabelled table out of published catalogues; ``read_catalog`` reads a finished one.
"""

from pix2mass.catalog.folds import sky_folds as sky_folds
from pix2mass.catalog.match import match_one_to_one as match_one_to_one
from pix2mass.catalog.published import read_published as read_published
from pix2mass.catalog.table import check_catalog as check_catalog
from pix2mass.catalog.table import read_catalog as read_catalog
from pix2mass.catalog.table import write_catalog as write_catalog
