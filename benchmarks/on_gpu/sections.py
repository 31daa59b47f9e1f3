"""The sections in order of importance, and the seconds each has of MINUTES (config.py)."""

from benchmarks.on_gpu import extraction, parts, step, study, verbs
from benchmarks.on_gpu.case import Section

SECTIONS = (
    Section("verbs", 60, verbs.cases, verbs.BARS),
    Section("step", 210, step.cases, step.BARS),
    Section("extraction", 60, extraction.cases, extraction.BARS),
    Section("parts", 150, parts.cases, parts.BARS),
    Section("study", float("inf"), study.cases, study.BARS),
)
