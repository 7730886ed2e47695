"""A whole spoke. Start `hubpeer up`, run this, then: hubpeer route --as ceo "can we afford the budget?" --wait"""

from hubpeer.spoke import Spoke, Step

spoke = Spoke("finance", capabilities=["budget_planning", "roi_calculation"], specialties=["cash_flow"])


@spoke.step
async def work(step: Step) -> object:
    return {"answer": f"finance looked into: {step.task}"}


spoke.run()
