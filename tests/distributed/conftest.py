from tests.training.conftest import colours, recipe_values  # noqa: F401
