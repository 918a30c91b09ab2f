"""Fine-tuning and pretraining of causal language models: all weights, LoRA or QLoRA, on the next token.

Run it as a program: ``python nemo_automodel/recipes/llm/train_ft.py -c config.yaml --section.key value``.
"""

from __future__ import annotations

from pathlib import Path

from nemo_automodel._transformers import auto_model
from nemo_automodel._transformers.options import refuse_packed_training
from nemo_automodel.components.config import targets
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config, run_safely
from nemo_automodel.recipes.base_recipe import BaseRecipe
from nemo_automodel.recipes.data_check import DataCheck, limits_of
from nemo_automodel.recipes.llm.text_data import TextData, model_path_of
from nemo_automodel.recipes.model_wishes import model_wishes
from nemo_automodel.shared.errors import UserError


class TrainFinetuneRecipeForNextTokenPrediction(BaseRecipe):
    """Train a causal language model on labelled text."""

    def model_name(self) -> str:
        """Return the model's directory or Hub name, or its target when it has neither."""
        return self._model_path() or str(self.settings.model.get("_target_"))

    def _model_path(self) -> str | None:
        return model_path_of(self.settings.model)

    def build_data(self) -> None:
        """Set the tokenizer, the training loader and the validation loaders."""
        data = TextData(self.settings, self.mesh, self._model_path())
        data.check_names()
        self.tokenizer = data.build_tokenizer()
        train_loader = self.train_loader = data.build_train_loader(self.tokenizer)
        self.val_loaders = data.build_val_loaders(self.tokenizer)
        if self.settings.data_check is not None:
            self.data_check = DataCheck(
                self.settings.data_check,
                train_loader,
                data.train_source,
                self.tokenizer,
                self.settings.seed,
                limits_of(self.settings.model, self._model_path()),
            )

    def build_model(self) -> None:
        """Load or make the model, with its adapter where there is one."""
        peft = None if self.settings.peft is None else self.settings.peft.instantiate()
        wishes = model_wishes(self.settings, peft)
        target = targets.resolve(self.settings.model.get("_target_"), "model._target_")
        if target.__module__ == auto_model.__name__:
            wishes["autocast_dtype"] = self.settings.distributed.autocast_dtype
            wishes["kernel_record"] = self.kernel_record
            wishes["memory_floor_gib"] = self.settings.unified_memory.floor_gib
            row_len = self.settings.packed_sequence.packed_sequence_size
            if row_len and self.settings.step_scheduler.local_batch_tokens is None:
                wishes["row_shape"] = (self.settings.step_scheduler.local_batch_size, row_len)
            self.model = self.settings.model.instantiate(device=self.device, **wishes)
            if peft is None and not str(self.settings.model.get("_target_")).endswith(".from_config"):
                refuse_packed_training(self.model_name(), self.model.config)
        else:
            if wishes:
                raise UserError(
                    f"`model._target_: {self.settings.model.get('_target_')}` returns a model that is taken as it is, "
                    f"so {', '.join(sorted(wishes))} cannot be applied. Use nemo_automodel.NeMoAutoModelForCausalLM."
                )
            self.model = self.settings.model.instantiate().to(self.device)


def main(config_path: str | Path | None = None) -> None:
    """Train as the command line says; ``config_path`` is used when it names no file.

    Raises:
        UserError: anything the user has to mend.
    """
    recipe = TrainFinetuneRecipeForNextTokenPrediction(parse_args_and_load_config(config_path))
    recipe.setup()
    recipe.run_train_validation_loop()


if __name__ == "__main__":
    raise SystemExit(run_safely(main))
