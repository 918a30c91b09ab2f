import torch, pytest
from nemo_automodel.components.datasets import loader as L
orig = L.ResumableDataLoader.__init__
def init(self, dataset, sampler, options):
    orig(self, dataset, sampler, {**options, "generator": torch.Generator().manual_seed(0)})
L.ResumableDataLoader.__init__ = init
import importlib.util, sys
spec = importlib.util.spec_from_file_location("ttt", "/work/main/tests/recipes/test_train_ft.py"); m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
make_config = m.make_config; set_up = m.set_up
test_x = m.test_a_stopped_run_goes_on_with_exactly_the_same_losses
