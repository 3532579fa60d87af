"""The main job: plan what applies to a model, run it within a budget, write an atlas."""
