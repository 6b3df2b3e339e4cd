"""Training, which can be interrupted at any moment, and evaluation."""

from .evaluation import Evaluation, evaluate
from .recipes import RECIPES, Recipe
from .run import Diverged, Result, train
from .saved import load_model

__all__ = ["RECIPES", "Diverged", "Evaluation", "Recipe", "Result", "evaluate", "load_model", "train"]
