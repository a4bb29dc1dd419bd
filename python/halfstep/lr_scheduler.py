"""Learning-rate schedules that follow applied steps."""


class SkipAware:
    """Wraps an LR scheduler: each step() advances it by the updates that were applied since the last one.

    Reads scaler.stats(), which never waits, so on a GPU the schedule may follow a step or two late; it never drifts.
    `which`: the loss whose optimizer this is, where the scaler has several.
    Any scheduler can be inside (SequentialLR, ChainedScheduler, …); arguments of step(), such as ReduceLROnPlateau's
    metric, are passed on. Everything else is the wrapped scheduler's.
    """

    def __init__(self, scheduler, scaler, which=0):
        if not hasattr(scaler, "stats"):
            raise TypeError(f"SkipAware: scaler is {type(scaler).__module__}.{type(scaler).__name__}; expected a halfstep.GradScaler, which counts applied steps")
        self.scheduler, self.scaler, self.which = scheduler, scaler, which
        self._seen = scaler.stats(which).steps_applied if scaler.is_enabled() else 0

    def step(self, *args, **kwargs):
        if not self.scaler.is_enabled():  # nothing is ever skipped
            self.scheduler.step(*args, **kwargs)
            return
        applied = self.scaler.stats(self.which).steps_applied
        for _ in range(applied - self._seen):
            self.scheduler.step(*args, **kwargs)
        self._seen = applied

    def get_last_lr(self):
        return self.scheduler.get_last_lr()

    def state_dict(self):
        return {"scheduler": self.scheduler.state_dict(), "seen": self._seen}

    def load_state_dict(self, state_dict):
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self._seen = state_dict["seen"]

    def __getattr__(self, name):
        if name == "scheduler":  # not there yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.scheduler, name)
