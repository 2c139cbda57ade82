"""Search: what Optuna tries within the ranges of a sweep file, and when it gives a run up.

Tree-structured Parzen estimators (Bergstra et al., 2011) choose each run's numbers; a run whose `eval/loss` lies above the
median of the others' at the same step is stopped. The journal `search.log` in the sweep's folder holds the trials, so that
sweeps on several machines that see the folder share them, and a sweep typed again goes on with them.
"""

import fcntl
import pathlib
from typing import IO, TYPE_CHECKING, Any

from experiments import hyper
from experiments.cli import UserError
from experiments.launch import Given, Run
from gptjax.training.metrics import read_metrics

if TYPE_CHECKING:
    from experiments.sweep import SweepFile

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState
except ModuleNotFoundError as error:
    raise UserError("the sweep file holds ranges, and optuna is missing: pip install 'gptjax[search]'") from error


class Search(Given):
    """The trials of a sweep's folder.

    Args:
      folder: of the sweep.
      sweep: what its file lists; ranges among the values are searched, and which of several points, too.
      num_trials: how many there are to be in all, on all machines and at all times.
    """

    def __init__(self, folder: pathlib.Path, sweep: "SweepFile", num_trials: int):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._folder, self._sweep, self._num_trials = folder, sweep, num_trials
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "search.log"))),
            study_name="sweep",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(),
            pruner=optuna.pruners.MedianPruner(),
        )
        self._running: dict[str, tuple[optuna.Trial, IO[str]]] = {}

    def take(self) -> Run | None:
        """The next trial: one that nobody goes on with, or a new one."""
        for found in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if run := self._hold(optuna.Trial(self._study, found._trial_id)):
                return run
        if len(self._study.get_trials(deepcopy=False)) >= self._num_trials:
            return None
        return self._hold(self._study.ask())

    def _hold(self, trial: optuna.Trial) -> Run | None:
        """A trial is its holder's until it is told, or its holder ends, however it ends."""
        values = self._values(trial)
        name = f"{trial.number:03},{self._sweep.label(values)}"
        if name in self._running:
            return None
        trial.set_user_attr("name", name)
        (self._folder / name).mkdir(exist_ok=True)
        file = open(self._folder / name / ".lock", "a")  # noqa: SIM115 - `ended` closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        self._running[name] = trial, file
        return self._sweep.run(values, name)

    def _values(self, trial: optuna.Trial) -> hyper.Run:
        """What the sampler chooses; of a trial taken up again, what it chose."""
        points = self._sweep.points
        number = trial.suggest_categorical("point", range(len(points))) if len(points) > 1 else 0

        def choose(name: str, value: Any) -> Any:
            if not isinstance(value, hyper.Range):
                return value
            suggest: Any = trial.suggest_int if isinstance(value.low, int) else trial.suggest_float
            return suggest(name, value.low, value.high, log=value.log)

        return {name: choose(name, value) for name, value in points[number].items()}

    def is_hopeless(self, run: Run) -> bool:
        """Reports the losses that a run has newly logged; whether it is to be given up."""
        trial, _ = self._running[run.name]
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        new = [(step, loss) for step, loss in _losses(self._folder / run.name) if step not in known]
        for step, loss in new:
            trial.report(loss, step)
        return bool(new) and trial.should_prune()

    def ended(self, run: Run, outcome: str) -> None:
        """Tells how a trial ended, and lets go of it; one that was stopped, but not given up, goes on another time."""
        trial, file = self._running.pop(run.name)
        if outcome == "finished":
            self._study.tell(trial, _losses(self._folder / run.name)[-1][1])
        elif outcome != "stopped":
            self._study.tell(trial, state=TrialState.PRUNED if outcome in ("pruned", "diverged") else TrialState.FAIL)
        file.close()

    def outcomes(self) -> dict[str, str]:
        """How each trial ended, by the name of its folder."""
        said = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        trials = self._study.get_trials(deepcopy=False)
        return {trial.user_attrs["name"]: said.get(trial.state, "stopped") for trial in trials}


def _losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    lines = read_metrics(workdir / "metrics.jsonl")
    evaluated = [line for line in lines if line["step"] and line.get("eval/loss") is not None]
    return [(line["step"], line["eval/loss"]) for line in evaluated]
