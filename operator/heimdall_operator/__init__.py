"""The operator: watches TrainingRuns, decides, acts."""
