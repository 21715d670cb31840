"""Cluster catalogues: one checked table whatever the file, and folds that keep neighbours on the sky together."""

from pix2mass.catalog.folds import sky_folds as sky_folds
from pix2mass.catalog.table import check_catalog as check_catalog
from pix2mass.catalog.table import read_catalog as read_catalog
from pix2mass.catalog.table import write_catalog as write_catalog
