"""Networks as judges of the mock sky; ``benchmarks/realism.py`` runs them and prints what they find.

A stamp is 64 x 64 pixels of 0.792" in five bands: native pixels summed two by two, so that neither real nor mock noise
is correlated between pixels by regridding, each band in units of the stamp's own scatter without sources: real noise
changes by up to 10% across a chip, which no judge should take for a difference between skies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from astropy.stats import sigma_clipped_stats
from astropy.wcs.utils import pixel_to_pixel
from torch import Tensor, nn
from torch.nn import functional as F

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.archive import decompress, frame_path, open_archive
from pix2mass.images.frame import parse_frame
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.mock.source import MockSource
from pix2mass.model import BandClassifier, Encoder, dihedral
from pix2mass.types import BANDS, SDSS_PIXEL_SCALE_ARCSEC

PIXELS = 64
_NATIVE = 2 * PIXELS
_MARGIN_PX = 20
_BATCH = 64
_FINE_TUNING_RATE = 1e-3
"""Peak learning rate from pretrained weights, a quarter of that from random ones: lowered after one field
showed no gain with the same rate for both."""

Progress = Callable[[str], None]


def _scatter(images: np.ndarray) -> np.ndarray:
    """Standard deviation over the last two axes without sources, clipped at 3 sigma about the median; unlike medians of
    differences it does not mind whole counts."""
    return sigma_clipped_stats(images, sigma=3.0, axis=(-2, -1))[2]


def _bin(native: np.ndarray) -> np.ndarray:
    """Sums of 2 x 2 pixels over the last two axes."""
    *rest, h, w = native.shape
    return native.reshape(*rest, h // 2, 2, w // 2, 2).sum(axis=(-3, -1))


def real_stamps(base: Path) -> dict[str, np.ndarray]:
    """All stamps of all fields of an archive.

    Args:
        base: folder that holds dr12.

    Returns:
        Field -> (n, 5, 64, 64) in unit noise. Bands are aligned to the nearest native pixel.
    """
    archive, index, stamps = open_archive(base), FrameIndex.from_base(base), {}
    for field in index.fields:
        frames = {}
        for band in BANDS:
            suffix = index.suffix(field, band) or ""
            data = archive.read(frame_path(field, band, suffix)) or b""
            frames[band] = parse_frame(decompress(data) if suffix.endswith(".bz2") else data, field, band)
        h, w = frames["r"].flux.shape
        cut = []
        for band in BANDS:
            x, y = pixel_to_pixel(frames["r"].wcs, frames[band].wcs, w / 2, h / 2)
            left, bottom = (_MARGIN_PX + round(float(shift)) for shift in (x - w / 2, y - h / 2))
            rows, columns = (h - 2 * _MARGIN_PX) // _NATIVE, (w - 2 * _MARGIN_PX) // _NATIVE
            whole = frames[band].flux[bottom : bottom + rows * _NATIVE, left : left + columns * _NATIVE]
            tiles = _bin(whole).reshape(rows, PIXELS, columns, PIXELS).swapaxes(1, 2).reshape(-1, PIXELS, PIXELS)
            cut.append(tiles / _scatter(tiles)[:, None, None])
        stamps[str(field)] = np.stack(cut, axis=1).astype(np.float32)
    return stamps


def mock_stamps(config: MockConfig, n: int, seed: int, unit: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Stamps of blank mock sky, each its own exposure.

    Args:
        config: the mock survey.
        n: number of stamps.
        seed: of the sky and the camera.
        unit: (n, 5) what to divide by; by default each stamp's own scatter, as for real ones.

    Returns:
        (n, 5, 64, 64), and what they were divided by, (n, 5).
    """
    grid = GridConfig(width_kpc=None, width_arcsec=_NATIVE * SDSS_PIXEL_SCALE_ARCSEC, n_pixels=_NATIVE)
    source = MockSource(config, grid, seed)
    cutouts = [source.cutout({"id": f"stamp-{k}", "z": 0.25, "ra_deg": 0.0, "dec_deg": 0.0}) for k in range(n)]
    stamps = _bin(np.stack([cutout.flux for cutout in cutouts]))
    if unit is None:
        unit = _scatter(stamps)
    return (stamps / unit[:, :, None, None]).astype(np.float32), unit


class _Judge(nn.Module):
    """A small network on all five bands: one logit per stamp, positive for the first kind."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()

        def block(n_in: int, n_out: int, kernel: int) -> nn.Sequential:
            convolution = nn.Conv2d(n_in, n_out, kernel, stride=2, padding=kernel // 2)
            return nn.Sequential(convolution, nn.BatchNorm2d(n_out), nn.ReLU())

        self.maps = nn.Sequential(
            block(len(BANDS), width, 5), block(width, 2 * width, 3), block(2 * width, 2 * width, 3)
        )
        self.head = nn.Sequential(nn.Linear(4 * width, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 1))

    def forward(self, stamps: Tensor) -> Tensor:
        maps = self.maps(torch.asinh(stamps))
        return self.head(torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1))[:, 0]


def _fit(network: nn.Module, loss: Callable[[Tensor], Tensor], n: int, epochs: int, rate: float, seed: int) -> None:
    """Train on batches of row numbers with AdamW and one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-2)
    per_epoch = n // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * per_epoch)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        for rows in order[: per_epoch * _BATCH].split(_BATCH):
            optimiser.zero_grad()
            loss(rows).backward()
            optimiser.step()
            schedule.step()
    network.eval()


def tell_apart(
    first: np.ndarray, second: np.ndarray, unseen_first: np.ndarray, unseen_second: np.ndarray, seed: int, epochs: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Train a judge to tell two kinds of stamps apart and try it on unseen ones.

    Args:
        first: (n, 5, 64, 64) stamps to train on.
        second: (m, 5, 64, 64) stamps of the other kind.
        unseen_first: stamps to test on.
        unseen_second: stamps of the other kind to test on.
        seed: of weights and batches.
        epochs: passes over the training stamps.

    Returns:
        Area under the ROC curve, and the judge's logits of the unseen stamps of either kind.
    """
    torch.manual_seed(seed)
    turn = np.random.default_rng(seed)
    judge = _Judge()
    stamps = torch.from_numpy(np.concatenate([first, second]))
    kind = torch.cat([torch.ones(len(first)), torch.zeros(len(second))])
    balance = torch.tensor(len(second) / len(first))

    def loss(rows: Tensor) -> Tensor:
        logits = judge(dihedral(stamps[rows], int(turn.integers(8))))
        return F.binary_cross_entropy_with_logits(logits, kind[rows], pos_weight=balance)

    _fit(judge, loss, len(stamps), epochs, 4e-3, seed)
    with torch.no_grad():
        a, b = (
            torch.stack([judge(dihedral(torch.from_numpy(part), view)) for view in range(8)]).mean(dim=0).numpy()
            for part in (unseen_first, unseen_second)
        )
    return float((a[:, None] > b[None]).mean() + 0.5 * (a[:, None] == b[None]).mean()), a, b


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the judges found.

    Attributes:
        auc: area under the ROC curve, real against mock, per field left out.
        null: the same for random halves of the real stamps.
        control: the same for mock against mock with one fault, by fault.
        logits: of real and of mock test stamps, per field; high means real.
        mock: the mock stamps (n, 5, 64, 64), in the order of the fields' logits, and their units (n, 5).
    """

    auc: dict[str, float]
    null: dict[str, float]
    control: dict[str, float]
    logits: dict[str, tuple[np.ndarray, np.ndarray]]
    mock: tuple[np.ndarray, np.ndarray]


def judge(real: Mapping[str, np.ndarray], config: MockConfig, seed: int, epochs: int, progress: Progress) -> Verdict:
    """Real against mock on a field not trained on, for each field; with the two controls.

    Args:
        real: from :func:`real_stamps`.
        config: the mock survey.
        seed: of everything.
        epochs: passes of each training.
        progress: called with a line per training.

    Returns:
        The verdict; the faults of the controls are noise 15% too strong and a PSF 15% too wide.
    """
    names = list(real)
    n = sum(len(stamps) for stamps in real.values())
    mock, unit = mock_stamps(config, n, seed)
    parts = np.array_split(np.arange(n), len(names))
    rng = np.random.default_rng(seed)
    auc, null, logits = {}, {}, {}
    for k, name in enumerate(names):
        others = np.concatenate([real[other] for other in names if other != name])
        rest = np.concatenate([part for j, part in enumerate(parts) if j != k])
        auc[name], a, b = tell_apart(others, mock[rest], real[name], mock[parts[k]], seed + k, epochs)
        logits[name] = (a, b)
        half, test_half = rng.random(len(others)) < 0.5, rng.random(len(real[name])) < 0.5
        null[name], _, _ = tell_apart(
            others[half], others[~half], real[name][test_half], real[name][~test_half], seed + k, epochs
        )
        progress(f"field {name}: real against mock {auc[name]:.3f}, real against real {null[name]:.3f}")
    control = {}
    physics = config.physics
    wrong = {
        "noise": {
            name: tuple(1.15 * value for value in getattr(physics, name))
            for name in ("pixel_sigma_min_nmgy", "pixel_sigma_max_nmgy")
        },
        "PSF": {"psf_fwhm_arcsec": tuple(1.15 * value for value in physics.psf_fwhm_arcsec)},
    }
    for what, change in wrong.items():
        other = config.model_copy(update={"physics": physics.model_copy(update=change)})
        # Another seed is another sky; the unit is that of the right noise, as an observer who trusts it would use.
        right, right_unit = mock_stamps(config, n, seed + 1)
        stamps, _ = mock_stamps(other, n, seed + 1, right_unit)
        test = n // 3
        control[what], _, _ = tell_apart(stamps[test:], mock[test:], stamps[:test], mock[:test], seed, epochs)
        progress(f"mock with 15% wrong {what} against mock: {control[what]:.3f}")
    return Verdict(auc, null, control, logits, (mock, unit))


def draw_easiest(verdict: Verdict, real: Mapping[str, np.ndarray], path: Path, columns: int = 10) -> None:
    """Picture of the stamps that the judges were surest of, real and mock, and of the most doubtful, in g, r and i."""
    stamps = np.concatenate([real[name] for name in verdict.logits])
    logits = [np.concatenate([pair[k] for pair in verdict.logits.values()]) for k in (0, 1)]
    mock = verdict.mock[0]
    rows = {
        "REAL, surest": stamps[np.argsort(-logits[0])[:columns]],
        "REAL, taken for mock": stamps[np.argsort(logits[0])[:columns]],
        "MOCK, surest": mock[np.argsort(logits[1])[:columns]],
        "MOCK, taken for real": mock[np.argsort(-logits[1])[:columns]],
    }
    figure, axes = plt.subplots(3 * len(rows), columns, figsize=(1.1 * columns, 3.4 * len(rows)))
    for k, (title, chosen) in enumerate(rows.items()):
        for j, band in enumerate("gri"):
            for ax, stamp in zip(axes[3 * k + j], chosen, strict=True):
                ax.imshow(np.arcsinh(stamp[BANDS.index(band)]), vmin=-1.5, vmax=4.0, origin="lower", cmap="gray")
                ax.set_axis_off()
            axes[3 * k + j][0].set_title(f"{title}, {band}", fontsize=7, loc="left")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _pretrained(classifier: BandClassifier, stamps: np.ndarray, seed: int, epochs: int, rate: float = 4e-3) -> None:
    """Train network 1 on stamps, each band an image of its own, with a random gain as in ``pix2mass.train``."""
    n_bands = stamps.shape[1]
    images = torch.from_numpy(stamps.reshape(-1, 1, *stamps.shape[2:]))
    rng = np.random.default_rng(seed)

    def loss(rows: Tensor) -> Tensor:
        gain = torch.from_numpy(np.exp(0.2 * rng.standard_normal(len(rows))).astype(np.float32))
        turned = dihedral(images[rows], int(rng.integers(8)))
        return F.cross_entropy(classifier(torch.asinh(gain[:, None, None, None] * turned)), rows % n_bands)

    _fit(classifier, loss, len(images), epochs, rate, seed)


@torch.no_grad()
def _accuracy(classifier: BandClassifier, stamps: np.ndarray) -> float:
    """Share of single-band images whose band is told right."""
    n_bands = stamps.shape[1]
    told = torch.cat(
        [
            classifier(torch.asinh(torch.from_numpy(part).reshape(-1, 1, *part.shape[2:]))).argmax(dim=1)
            for part in np.array_split(stamps, max(1, len(stamps) // _BATCH))
        ]
    ).numpy()
    return float((told == np.arange(len(told)) % n_bands).mean())


def band_transfer(
    real: Mapping[str, np.ndarray], mock: np.ndarray, seeds: int, epochs: tuple[int, int], progress: Progress
) -> dict[str, np.ndarray]:
    """What pretraining on mock stamps is worth to network 1 on a real field left out.

    Args:
        real: from :func:`real_stamps`.
        mock: (n, 5, 64, 64) mock stamps.
        seeds: how often everything is repeated.
        epochs: passes over mock and over real stamps.
        progress: called with a line per pair of trainings.

    Returns:
        Accuracies of shape (seeds, fields): ``real_only``, ``mock_then_real``, ``mock_only``.
    """
    names = list(real)
    result = {kind: np.zeros((seeds, len(names))) for kind in ("real_only", "mock_then_real", "mock_only")}
    for seed in range(seeds):
        torch.manual_seed(seed)
        on_mock = BandClassifier(Encoder(), len(BANDS))
        start = {name: value.clone() for name, value in on_mock.state_dict().items()}
        _pretrained(on_mock, mock, seed, epochs[0])
        end = {name: value.clone() for name, value in on_mock.state_dict().items()}
        for k, name in enumerate(names):
            others = np.concatenate([real[other] for other in names if other != name])
            result["mock_only"][seed, k] = _accuracy(on_mock, real[name])
            for kind, state, rate in (("real_only", start, 4e-3), ("mock_then_real", end, _FINE_TUNING_RATE)):
                classifier = BandClassifier(Encoder(), len(BANDS))
                classifier.load_state_dict(state)
                _pretrained(classifier, others, 100 * seed + k, epochs[1], rate)
                result[kind][seed, k] = _accuracy(classifier, real[name])
            shown = ", ".join(f"{kind.replace('_', ' ')} {value[seed, k]:.3f}" for kind, value in result.items())
            progress(f"seed {seed}, field {name}: {shown}")
    return result
