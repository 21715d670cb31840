"""What the networks look at: maps of the mass (network 2) and of the band (network 1), and what they say in files.

``attribution`` has the methods and their definitions, ``blank_sky`` what images are compared with, ``files`` the
output. docs/maps.md says why each was chosen and what the maps can and cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pix2mass.config import GridConfig
from pix2mass.explain.attribution import DEFAULT_METHOD as DEFAULT_METHOD
from pix2mass.explain.attribution import METHODS as METHODS
from pix2mass.explain.attribution import band_maps, mass_maps
from pix2mass.explain.blank_sky import blank_sky
from pix2mass.explain.files import file_name, write_fits
from pix2mass.model import BandClassifier, Encoder, make_units, prepare
from pix2mass.predict import Predictor
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore
from pix2mass.types import Pix2massError
from pix2mass.weights import is_packaged


def explain(
    run: Predictor | RunFolder | str | Path,
    store: ImageStore | str | Path,
    ids: Sequence[str],
    steps: int = 64,
    compare: bool = False,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 1,
) -> list[Path]:
    """Maps of some clusters, written as ``ID.npz`` and ``ID.fits`` (one extension per map, with the cutout's WCS).

    Args:
        run: a run folder with finished training, the name of packaged weights, or a Predictor.
        store: sealed images with the run's bands, or more, on its grid; blank sky is drawn from them too.
        ids: which clusters.
        steps: gradients taken along the integral in integrated gradients, per network.
        compare: also make the maps of the other methods: plain gradient, SmoothGrad, occlusion.
        out: folder to write to; ``maps/`` in the run folder if None, which packaged weights do not have.
        progress: called with (done, total).
        seed: of the draws of blank sky.

    Returns:
        Paths of the ``.npz`` files, each with ``id``, ``bands``, ``flux`` (n_bands, h, w; nanomaggies per pixel),
        ``mask`` (n_bands, h, w), ``pixel_scale_arcsec``, ``ra_deg``, ``dec_deg``, ``z``, ``flags`` (bits of the
        cutout), ``log10_m500c``, ``log10_m500c_err``, ``default_method`` (the map to look at first, see
        ``DEFAULT_METHOD``); the maps of :func:`~pix2mass.explain.attribution.mass_maps` and,
        if the run keeps its band classifier, those of :func:`~pix2mass.explain.attribution.band_maps` with ``band_``
        before their names.

    Raises:
        Pix2massError: the store does not fit the run, lacks an id, or a cluster has no usable pixels or no redshift
            where the run needs one.
    """
    predictor = run if isinstance(run, Predictor) else Predictor(run)
    store = predictor.images(store if isinstance(store, ImageStore) else ImageStore.open(store))
    rows = store.rows(list(ids))
    predictor.check_redshifts(store, rows)
    classifier = load_band_classifier(predictor.folder, predictor.grid)
    if out is None and is_packaged(predictor.folder):
        raise Pix2massError(
            f"{predictor.folder.path.name}: packaged weights keep no maps; say where to write them (out)"
        )
    folder = out or predictor.folder / "maps"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for done, (cluster_id, row) in enumerate(zip(ids, rows, strict=True), start=1):
        if not np.isfinite(store.noise[row]).any():
            raise Pix2massError(f"{cluster_id}: the cutout has no usable pixels, there is nothing to explain")
        flux, mask = store.batch([row])
        noise = torch.from_numpy(store.noise[row : row + 1])
        images, valid = prepare(torch.from_numpy(flux), torch.from_numpy(mask), noise)
        z = torch.tensor([np.nan_to_num(store.z[row])], dtype=torch.float32)
        blank = blank_sky(store, row, seed)
        maps = mass_maps(predictor, images, valid, noise, z, blank, steps, compare)
        if classifier is not None:
            found = band_maps(classifier, images, noise, z, blank, steps, compare)
            maps |= {f"band_{name}": values for name, values in found.items()}
        mass, mass_err = predictor.estimate(predictor.regressors[0].rescale(images, noise, z), valid, z)
        maps = {
            "id": np.array(cluster_id),
            "bands": np.array(store.grid.bands),
            "flux": flux[0],
            "mask": mask[0],
            "pixel_scale_arcsec": store.pixel_scale_arcsec[row],
            "ra_deg": store.ra_deg[row],
            "dec_deg": store.dec_deg[row],
            "z": store.z[row],
            "flags": store.flags[row],
            "log10_m500c": mass.item(),
            "log10_m500c_err": mass_err.item(),
            "default_method": np.array(DEFAULT_METHOD[predictor.info.get("network", "bands")]),
            **maps,
        }
        path = folder / f"{file_name(cluster_id)}.npz"
        np.savez_compressed(path, **maps)
        write_fits(path.with_name(f"{file_name(cluster_id)}.fits"), maps)
        paths.append(path)
        if progress:
            progress(done, len(rows))
    return paths


def load_band_classifier(folder: RunFolder, grid: GridConfig) -> BandClassifier | None:
    """Network 1 of a run, for images on a grid, with its head, in eval mode; None if the run was not pretrained by
    telling bands."""
    if not (folder / "band-head.safetensors").exists():
        return None
    info = folder.read_json("pretrain.json")
    classifier = BandClassifier(Encoder(info["encoder"]), len(info["bands"]), make_units(info, grid))
    classifier.encoder.load_state_dict(folder.load_weights("encoder"))
    classifier.head.load_state_dict(folder.load_weights("band-head"))
    return classifier.eval()
