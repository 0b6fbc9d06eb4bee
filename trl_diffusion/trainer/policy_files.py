"""How a trainer saves a policy, and loads it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel

from ..policies.files import check_one_policy
from ..policies.forward import unwrap
from ..policies.loading import load_renamed_weights


if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

    class _Trainer(Trainer):
        """Narrowed types of inherited attributes."""

        model: PreTrainedModel
else:
    _Trainer = object


class TiedWeights(_Trainer):
    """For a [`~transformers.Trainer`]: a weight that a checkpoint holds under the name of another one is not missing from it."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warns about weights that a checkpoint lacks. A weight that is tied to one that was loaded is not missing."""
        names: dict[int, set[str]] = {}
        for name, weight in unwrap(self.model).named_parameters(remove_duplicate=False):
            names.setdefault(id(weight), set()).add(name)
        missing = set(load_result.missing_keys)
        tied = {name for group in names.values() if group - missing for name in group}
        left = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=left))


class PolicyFiles(TiedWeights):
    """
    For a [`~transformers.Trainer`]: a directory holds one policy, and checkpoints of families with weight names of their own can
    be loaded. Put this class before the trainer in the list of base classes.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the policy, as [`~transformers.Trainer.save_model`] does.

        Raises:
            ValueError: if the directory holds a whole model and this is an adapter, or the other way round.
        """
        check_one_policy(output_dir or str(self.args.output_dir), isinstance(unwrap(self.model), PeftModel))
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_renamed(self, checkpoint: str | None) -> bool:
        """Loads a checkpoint with a family's own weight names, which transformers' trainer would ignore with a warning."""
        model = unwrap(self.model)
        if checkpoint is None or isinstance(model, PeftModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False  # these checkpoints use the names of the model
        return load_renamed_weights(model, checkpoint)
