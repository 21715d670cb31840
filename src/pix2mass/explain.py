"""What the networks look at: integrated gradients, class-activation maps, and the two joined.

Definitions, for the mean log10 M500c of a run's networks (the idea of joining is the paper's, the equations are ours):

- integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) from blank sky (normalised flux 0) to the image,
  through both networks to the pixels of each band, in dex per pixel: their sum is the prediction minus that of blank
  sky;
- class-activation map (Grad-CAM, Selvaraju et al. 2017, arXiv 1610.02391) on the encoder's last feature maps, summed
  over bands, signed, since a regression can be pushed either way;
- joint map = integrated gradients summed over bands x |CAM| / max |CAM|: pixels that matter by both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam
from torch import Tensor

from pix2mass.model import prepare
from pix2mass.predict import Predictor
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore
from pix2mass.types import Pix2massError

_INTERNAL_BATCH = 16


def explain(
    run: Predictor | RunFolder | str | Path,
    store: ImageStore | str | Path,
    ids: Sequence[str],
    steps: int = 32,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Attribution maps of some clusters, written one file each.

    Args:
        run: a run folder with finished training, or a Predictor.
        store: sealed images with the run's bands and grid.
        ids: which clusters.
        steps: of the integral in integrated gradients.
        out: folder to write to; ``maps/`` in the run folder if None.
        progress: called with (done, total).

    Returns:
        Paths of the ``.npz`` files, each with ``id``, ``bands``, ``flux`` (n_bands, h, w; nanomaggies per pixel),
        ``mask`` (n_bands, h, w), ``pixel_scale_arcsec``, ``ra_deg``, ``dec_deg``, ``z``, ``log10_m500c``,
        ``log10_m500c_err``, ``log10_m500c_blank_sky``, ``integrated_gradients`` (n_bands, h, w; dex per pixel),
        ``cam`` (h, w), ``joint`` (h, w; dex per pixel) and ``completeness_error_dex``, what the gradients' sum misses.

    Raises:
        Pix2massError: the store does not fit the run, lacks an id, or a cluster has no usable pixels.
    """
    predictor = run if isinstance(run, Predictor) else Predictor(run)
    store = store if isinstance(store, ImageStore) else ImageStore.open(store)
    predictor.check_store(store)
    rows = store.rows(list(ids))
    folder = out or predictor.folder / "maps"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for done, (cluster_id, row) in enumerate(zip(ids, rows, strict=True), start=1):
        if not np.isfinite(store.noise[row]).any():
            raise Pix2massError(f"{cluster_id}: the cutout has no usable pixels, there is nothing to explain")
        flux, mask = store.batch([row])
        images, valid = prepare(
            torch.from_numpy(flux), torch.from_numpy(mask), torch.from_numpy(store.noise[row : row + 1])
        )
        maps = attribute(predictor, images, valid, torch.tensor([store.z[row]], dtype=torch.float32), steps)
        # The id may hold any character; quoted, it cannot name a path outside the folder.
        path = folder / f"{quote(cluster_id, safe='')}.npz"
        np.savez_compressed(
            path,
            id=np.array(cluster_id),
            bands=np.array(store.grid.bands),
            flux=flux[0],
            mask=mask[0],
            pixel_scale_arcsec=store.pixel_scale_arcsec[row],
            ra_deg=store.ra_deg[row],
            dec_deg=store.dec_deg[row],
            z=store.z[row],
            **maps,
        )
        paths.append(path)
        if progress:
            progress(done, len(rows))
    return paths


def attribute(predictor: Predictor, images: Tensor, valid: Tensor, z: Tensor, steps: int) -> dict[str, Any]:
    """Maps of one cluster as arrays, keys as in :func:`explain`.

    Args:
        predictor: the networks.
        images: (1, n_bands, h, w) from :func:`pix2mass.model.prepare`.
        valid: (1, h, w) usable share.
        z: (1,) redshift.
        steps: of the integral.
    """

    def mean_mass(images: Tensor, valid: Tensor, z: Tensor) -> Tensor:
        return torch.stack([regressor(images, valid, z)[0] for regressor in predictor.regressors]).mean(dim=0)

    gradients, error = IntegratedGradients(mean_mass).attribute(
        images,
        baselines=torch.zeros_like(images),
        additional_forward_args=(valid, z),
        n_steps=steps,
        internal_batch_size=_INTERNAL_BATCH,
        return_convergence_delta=True,
    )
    cam = torch.zeros(images.shape[2:])
    for regressor in predictor.regressors:
        grad_cam = LayerGradCam(lambda *inputs, net=regressor: net(*inputs)[0], regressor.encoder.taps[-1])
        low = grad_cam.attribute(images, additional_forward_args=(valid, z), relu_attributions=False)
        high = LayerAttribution.interpolate(low, tuple(images.shape[2:]), "bilinear")
        cam += high.detach().sum(dim=(0, 1)) / len(predictor.regressors)
    summed = gradients.detach().sum(dim=1)[0]
    with torch.no_grad():
        mass, mass_err = predictor.estimate(images, valid, z)
        blank = mean_mass(torch.zeros_like(images), valid, z)
    return {
        "log10_m500c": mass.item(),
        "log10_m500c_err": mass_err.item(),
        "log10_m500c_blank_sky": blank.item(),
        "integrated_gradients": gradients.detach()[0].numpy().astype(np.float32),
        "cam": cam.numpy(),
        "joint": (summed * cam.abs() / cam.abs().max().clamp_min(1e-12)).numpy().astype(np.float32),
        "completeness_error_dex": float(error.abs().item()),
    }
