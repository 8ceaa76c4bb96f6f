"""modeltorch itself, through the functions of `modeltorch bench`, so that its lines carry the limits of the machine."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from harness import REQUEST_NEW_TOKENS, REQUEST_PROMPT, Workload, parser

from modeltorch import bench
from modeltorch.subject import Subject


def measure(subject: Subject, workload: Workload, runs: int) -> Iterator[bench.Result]:
    """The measurements of a workload."""
    if workload.kind == "prefill":
        return bench.prefill(subject, workload.batch, workload.length, runs)
    if workload.kind == "decode":
        return bench.decode(subject, workload.batch, workload.length)
    return bench.serve(subject, workload.batch, REQUEST_PROMPT, REQUEST_NEW_TOKENS)


def main() -> None:
    """Loads once and prints a line for each measurement; there is nothing to convert."""
    given = parser(__doc__).parse_args()
    if given.action == "convert":
        return
    torch.set_num_threads(given.threads)
    subject = Subject.from_checkpoint(str(given.checkpoint), "cpu", given.dtype)
    for name in given.workloads.split(","):
        for result in measure(subject, Workload.parse(name), given.runs):
            print(json.dumps(result.as_json()), flush=True)


if __name__ == "__main__":
    main()
