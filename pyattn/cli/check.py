"""``python -m pyattn check``: judge arrays that any program wrote, or this installation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
With a file: judge attention that any program computed, by the arrays it wrote. Without one: check
this installation, every public function on every backend that can run here.

Exit status: 0 all right, 1 something is wrong, 2 the file cannot be used.
"""

_FORMAT = """\
the file
  .npz (NumPy) or .safetensors, arrays by these names:
    q, k, v          (..., H, N, D), (..., G, M, D), (..., G, M, E)          needed
    out, lse         (..., H, N, E), (..., H, N), lse in natural logarithms
    dout, dlse       gradients of the loss by out and by lse
    dq, dk, dv       gradients, and dbias, dgate, dscale, dsinks, dalibi_slopes
    bias, gate       broadcast to (..., H, N, M); -inf in a bias masks
    mask             boolean, True = may attend, broadcasts to (..., H, N, M)
    sinks, alibi_slopes, scale    (H,)
    keep             boolean (..., H, N, M), what dropout kept
  options, as a JSON text in the entry (safetensors: the metadata) "options", or in an .npz
  each as a number of its own:
    causal           false, true (aligned to the bottom right), "top_left"
    window           w: |i - j| <= w (causal: 0 <= i - j <= w), or [left, right]
    scale, softcap, dropout       numbers; scale is 1/sqrt(D) unless told
    kv_lengths, q_lengths         integers that broadcast over the batch
    segments         lengths of packed sequences, or [q_lengths, kv_lengths]
    layout           "bhnd", or "bnhd" if arrays of tokens are (B, N, H, D)
    dtype            "bfloat16" if arrays of uint16 in an .npz hold its bits
    out_dtype, grad_dtype         if they differ from that of q
  Whatever of out, lse and the gradients is there is checked.

how to write one
  torch
    from safetensors.torch import save_file; import json
    arrays = dict(q=q, k=k, v=v, out=out, dout=dout, dq=q.grad, dk=k.grad, dv=v.grad)
    save_file({n: x.detach().contiguous() for n, x in arrays.items()}, "dump.safetensors",
              {"options": json.dumps({"causal": True})})
  JAX
    import numpy as np
    out, pull = jax.vjp(attention, q, k, v); dq, dk, dv = pull(dout)
    np.savez("dump.npz", q=q, k=k, v=v, out=out, dout=dout, dq=dq, dk=dk, dv=dv, causal=True)
  CUDA C++ (then in Python: x = np.fromfile("q.bin", np.float16).reshape(B, H, N, D))
    std::vector<__half> host(n);
    cudaMemcpy(host.data(), q, n * sizeof(__half), cudaMemcpyDeviceToHost);
    std::ofstream("q.bin", std::ios::binary).write((char*)host.data(), n * sizeof(__half));
  CuPy
    import cupy, numpy as np
    arrays = dict(q=q, k=k, v=v, out=out, dout=dout, dq=dq, dk=dk, dv=dv)
    np.savez("dump.npz", causal=True, **{n: cupy.asnumpy(x) for n, x in arrays.items()})
"""


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "check", help="judge arrays written by any program, or this installation",
        description=_DESCRIPTION, epilog=_FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", nargs="?", type=Path, help=".npz or .safetensors file to judge")
    parser.add_argument("--report", type=Path, metavar="PAGE.html",
                        help="write the report as one self-contained page, too")
    parser.add_argument("--thorough", action="store_true",
                        help="without a file: every case in every dtype, which takes minutes")
    parser.add_argument("--max-bytes", type=int, default=2 ** 32, metavar="N",
                        help="refuse a file whose arrays claim more than this (default: 4 GiB)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the file, or the installation."""
    from pyattn.testing import DumpError, check_dump

    from .progress import progress

    if args.dump is None:
        report = _installation(args.thorough)
    else:
        try:
            with progress(f"judging {args.dump.name}", total=4) as bar:
                report = check_dump(args.dump, max_bytes=args.max_bytes,
                                    advance=lambda text: bar.advance(text=text))
        except (DumpError, ValueError, TypeError) as error:
            print(f"pyattn check: {error}", file=sys.stderr)
            return 2
        print(report)
    if args.report is not None:
        report.to_html(args.report)
        print(f"written: {args.report}")
    return 0 if report else 1


def _installation(thorough: bool) -> Any:
    from pyattn.testing.installation import tasks
    from pyattn.testing.report import FAILED, OK, SKIPPED, Report, table, text_failure

    from .progress import progress

    listed = tasks(thorough)
    results, rows = [], [["function", "arrays", "backend", "result", "passed", "failed", "skipped",
                          "worst"]]
    with progress("checking", total=len(listed)) as bar:
        for task in listed:
            found = task.results()
            bar.advance(text=task.subject)
            results += found
            part = Report(task.subject, tuple(found))
            status = OK if part else FAILED if part.failures else SKIPPED
            worst = max((c.error / c.bound for r in found for c in r.comparisons if c.bound),
                        default=None)
            rows.append([task.function, task.library, task.backend, status, str(part.count(OK)),
                         str(len(part.failures)), str(part.count(SKIPPED)),
                         "" if worst is None else f"{worst:.0%} of the allowed error"])
    report = Report("this installation of pyattn", tuple(results))
    for result in report.failures:
        print("\n".join([*text_failure(result), ""]))
    print("\n".join(table(rows, right=(4, 5, 6))))
    for line in _reasons(report.results):
        print(line)
    print(f"\n{'PASSED' if report else 'FAILED'}: {report.summary}")
    return report


def _reasons(results: Iterable[Any]) -> list[str]:
    """Why something was skipped, each reason once."""
    reasons: dict[str, None] = {}
    for result in results:
        if result.status == "skipped":
            reasons[f"skipped: {result.subject}: {result.message}"] = None
    return ["", *reasons] if reasons else []
