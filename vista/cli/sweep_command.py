"""The command `vista sweep`."""

from __future__ import annotations

from vista.config import SweepConfig
from vista.device import keep_freed_memory
from vista.errors import SweepError
from vista.sweep.sweep import sweep
from vista.sweep.sweep_report import SweepReport


def run_sweep(config: SweepConfig) -> SweepReport:
    """`vista sweep`; errors as of `sweep`.

    Raises:
        SweepError: trials have failed, or are not complete in their tracker; the results of all are printed first.
    """
    keep_freed_memory()
    report = sweep(config)
    failed, not_tracked = len(report.failed()), len(report.not_tracked())
    if failed or not_tracked:
        print(report)
        counts = [f"{failed} of {report.num_trials} trials failed"] if failed else []
        counts += [f"{not_tracked} finished trials are not complete in the tracker"] if not_tracked else []
        raise SweepError(
            f"{', '.join(counts)}; they are listed above and in {report.folder}/results.md. Rerun the command to try "
            "these trials again"
        )
    return report
