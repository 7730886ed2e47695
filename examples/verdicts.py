"""A spoke that decides: its verdict takes part in the plan's conflict rule, and it reports progress on long work."""

from hubpeer.spoke import Done, Spoke, Step, StepFailed

spoke = Spoke("sales", capabilities=["pipeline_forecasting", "deal_analysis"], specialties=["quota_planning"])


@spoke.step
async def work(step: Step) -> Done:
    if not step.query:
        raise StepFailed("there is nothing to look at")  # this text reaches the asker; any other exception's does not
    await step.progress("reading the pipeline")
    before = step.results  # what the steps this one depends on reported, by agent
    return Done({"deals": 12, "read": sorted(before)}, verdict="approve")


spoke.run()
