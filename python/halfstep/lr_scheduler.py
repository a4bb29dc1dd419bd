"""Learning-rate schedules that follow applied steps."""


class SkipAware:
    """Wraps an LR scheduler: each step() advances it by the updates that were applied since the last one.

    Reads scaler.stats(), which never waits, so on a GPU the schedule may follow a step or two late; it never drifts.
    """

    def __init__(self, scheduler, scaler):
        self.scheduler, self.scaler = scheduler, scaler
        self._seen = scaler.stats().steps_applied

    def step(self):
        applied = self.scaler.stats().steps_applied
        for _ in range(applied - self._seen):
            self.scheduler.step()
        self._seen = applied

    def get_last_lr(self):
        return self.scheduler.get_last_lr()

    def state_dict(self):
        return {"scheduler": self.scheduler.state_dict(), "seen": self._seen}

    def load_state_dict(self, state_dict):
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self._seen = state_dict["seen"]
