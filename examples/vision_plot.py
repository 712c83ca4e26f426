"""The picture that train_vision.py leaves: loss curves, and spectra under T."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = {'spectral_newton': '#0072B2', 'adamw': '#E69F00', 'muon': '#009E73'}
GREY = '#777777'
STYLE: Any = {
  'font.size': 11,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': GREY,
  'axes.titlesize': 11,
  'xtick.color': '#444444',
  'ytick.color': '#444444',
  'axes.grid': True,
  'grid.color': '#E6E6E6',
  'grid.linewidth': 0.8,
  'axes.axisbelow': True,
  'legend.frameon': False,
}
PANELS = 6
PLAIN = FuncFormatter(lambda value, _: f'{value:g}')


def plot(report: Mapping[str, Any], titles: Mapping[str, str], path: pathlib.Path) -> None:
  """Writes the PNG.

  Args:
    report: What train_vision.py writes as JSON.
    titles: What the optimizers are called, by name.
    path: Of the PNG.
  """
  layers = choose_layers(report['spectra'])
  with plt.rc_context(STYLE):
    figure = plt.figure(figsize=(12, 5.4), dpi=150, layout='constrained')
    if layers:
      halves: Any = figure.subfigures(1, 2, width_ratios=[5, 7])
      _losses(halves[0].subplots(), report, titles)
      _spectra(halves[1], report['spectra'], layers)
    else:
      _losses(figure.subplots(), report, titles)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def choose_layers(spectra: Mapping[str, Any], count: int = PANELS) -> list[str]:
  """Stem, convolutions at even distances, head: first and last, and depth between."""
  inner = [n for n in spectra if n.split('/')[-2] not in ('stem', 'head', 'shortcut')]
  ends = [[n for n in spectra if n.split('/')[-2] == end] for end in ('stem', 'head')]
  room = min(count - sum(map(len, ends)), len(inner))
  picked = [inner[round(i)] for i in np.linspace(0, len(inner) - 1, room)]
  return [*ends[0], *picked, *ends[1]]


def smooth(losses: np.ndarray) -> np.ndarray:
  """Centred running mean over a twentieth of the steps, along the last axis."""
  half = max(1, losses.shape[-1] // 40)
  total = np.cumsum(np.pad(losses, ((0, 0), (1, 0))), axis=-1)
  steps = np.arange(losses.shape[-1])
  first, last = np.maximum(steps - half, 0), np.minimum(steps + half + 1, len(steps))
  return (total[:, last] - total[:, first]) / (last - first)


def _losses(axes: Axes, report: Mapping[str, Any], titles: Mapping[str, str]) -> None:
  task = report['task']
  for name, result in report['optimizers'].items():
    curves = smooth(np.array([run['train_losses'] for run in result['runs']], float))
    steps = np.arange(1, curves.shape[1] + 1)
    accuracy = result['test_accuracy']
    label = f'{titles[name]}: {100 * accuracy["mean"]:.2f}'
    if len(curves) > 1:
      label += f' ± {100 * accuracy["std"]:.2f}'
      axes.fill_between(
        steps, curves.min(0), curves.max(0), color=COLOURS[name], alpha=0.18, linewidth=0
      )
    axes.plot(steps, curves.mean(0), color=COLOURS[name], linewidth=2, label=label)
  axes.set_yscale('log')
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(PLAIN)
  axes.yaxis.set_minor_formatter(NullFormatter())
  axes.set_xlabel('step')
  axes.set_ylabel('training loss, running mean')
  name = {'fashion-mnist': 'Fashion-MNIST', 'cifar-10': 'CIFAR-10'}.get(task['data'], task['data'])
  axes.set_title(f'{name}: {task["train_images"]:,} images, {task["epochs"]} epochs', fontsize=13)
  axes.legend(title='test accuracy, %', alignment='left', loc='upper right')


def _spectra(figure: SubFigure, spectra: Mapping[str, Any], layers: list[str]) -> None:
  figure.suptitle('Momentum at the end: singular values, and T of them without noise', fontsize=13)
  panels = figure.subplots(2, 3, sharey=True)
  for axes in panels.flat[len(layers) :]:
    axes.set_visible(False)
  for axes, name in zip(panels.flat, layers, strict=False):
    layer = spectra[name]
    sigma, transferred = np.array(layer['sigma']), np.array(layer['transferred'])
    # Without directions that are there by rounding alone, like a classifier's last.
    there = sigma > 1e-4 * sigma.max(initial=0)
    rank = np.arange(1, len(sigma) + 1)[there]
    marks = {'marker': 'o', 'markersize': 3}
    axes.plot(rank, sigma[there], color=GREY, label='σ$_k$, over its RMS', **marks)
    axes.plot(
      rank,
      transferred[there],
      color=COLOURS['spectral_newton'],
      label='T(σ$_k$) = σ$_k$ / (σ$_k^α$ + d)',
      **marks,
    )
    axes.set_title(f'{_layer_title(name)}\nα = {layer["alpha"]:g}, d = {layer["damping"]:.3g}')
    axes.set_xscale('log')
    axes.set_yscale('log')
    axes.set_ylim(0.012, 8)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
  for axes in panels[-1]:
    axes.set_xlabel('rank k')
  handles, labels = panels.flat[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=2, fontsize=11.5)


def _layer_title(name: str) -> str:
  """blocks/0/conv1/kernel -> block 1, convolution 1."""
  parts = name.split('/')[:-1]
  if parts[0] != 'blocks':
    return parts[0]
  return f'block {int(parts[1]) + 1}, {parts[2].replace("conv", "conv ")}'
