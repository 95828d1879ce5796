"""Processes that begin with torch, timm and dnas imported: forks of one that did it once, in a tenth of the time."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dnas.export.model_file", "dnas.report.pages", "dnas.methods.gates", "timm"])
