"""Many cutouts on one grid, in a folder or at any URL that Zarr opens."""

from pix2mass.store.builder import Source as Source
from pix2mass.store.builder import build as build
from pix2mass.store.image_store import ImageStore as ImageStore
