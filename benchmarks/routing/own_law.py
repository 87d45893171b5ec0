"""Requests about law of our own making: questions of clients, and cases as exams set them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from .filling import filled, parts

__all__ = ["legal", "legal_cases"]

_PARTIES = parts(
    "my landlord|my employer|my neighbour|the seller|a contractor|my ex-husband|the insurance company|an airline|my"
    " business partner|the hospital|a debt collector|my bank|the police|a former employee|the homeowners "
    "association|the manufacturer|my stepson|the tenant"
)
_DEEDS = parts(
    "broke the contract|refuses to return the deposit|copied my design|fired me without notice|built a fence on my "
    "land|did not deliver the goods|recorded our phone call|changed the locks|published my photo|owes me money|was "
    "injured on my property|never paid the invoice|sold me a defective car|read my private mail|cut down a tree on "
    "the boundary|disclosed a trade secret|left the will unsigned|searched my house without a warrant"
)
_MATTERS = parts(
    "non-compete clauses|the statute of limitations|eminent domain|adverse possession|hearsay|promissory "
    "estoppel|consideration|habeas corpus|double jeopardy|strict liability|force majeure|power of "
    "attorney|probate|joint custody|spousal support|bail|plea bargaining|trademark infringement|fair use|negligence"
    " per se|easements|the exclusionary rule|piercing the corporate veil|indemnification|arbitration clauses|due "
    "process|unjust enrichment|the parol evidence rule|defamation|a restraining order|fiduciary duty|sovereign "
    "immunity"
)
_PLACES = ("California", "Texas", "New York", "Ontario", "England", "Germany", "Florida", "the EU", "India", "Ohio")
_PAPERS = parts(
    "a lease agreement|a non-disclosure agreement|an employment contract|a last will|a privacy policy|terms of "
    "service|a prenuptial agreement|a cease and desist letter|a licence agreement|a power of attorney|a shareholder"
    " agreement|a settlement agreement|a demand letter|articles of incorporation"
)
_CLAUSES = (
    "The Supplier shall indemnify and hold harmless the Customer against all claims arising out of any breach of this "
    "Agreement.",
    "Either party may terminate this Agreement upon thirty (30) days' prior written notice.",
    "Tenant shall not assign this Lease or sublet the Premises without the prior written consent of Landlord.",
    "We may share your personal data with third parties where we have a legal obligation to do so.",
    "This Agreement shall be governed by the laws of the State of Delaware, without regard to conflicts of law.",
    "IN NO EVENT SHALL EITHER PARTY BE LIABLE FOR ANY INDIRECT OR CONSEQUENTIAL DAMAGES.",
    "The Employee shall not, for a period of twelve months after termination, solicit any client of the Company.",
    "Any dispute arising under this Agreement shall be finally settled by binding arbitration.",
    "The Licensee is granted a non-exclusive, non-transferable licence to use the Software.",
    "The deposit shall be returned within thirty days after the tenant vacates the premises, less lawful deductions.",
)
_LEGAL = (
    "Can I sue {p} if they {x}?",
    "What can I do when {p} {x}?",
    "Is it legal in {l} for {p} to keep my deposit?",
    "How does {m} work in {l}?",
    "What is {m}?",
    "Explain {m} in plain English.",
    "What are the elements of {m}?",
    "{p} {x}. What are my rights in {l}?",
    "Draft {c} for a small company in {l}.",
    "What must {c} contain to be valid in {l}?",
    "Do I need a lawyer for {c}?",
    "Is {c} enforceable in {l} without a witness?",
    "How long do I have to file a claim in {l} after {p} {x}?",
    "What is the penalty in {l} for driving without a licence?",
    "What is the difference between {m} and {n}?",
    "What does this clause mean? {q}",
    "Is the following clause enforceable in {l}?\n\n{q}",
    "{q}\n\nDoes this clause favour one of the parties?",
    "Rewrite this clause so that a consumer understands it: {q}",
    "{q} {r}\n\nMay the other party end the agreement early?",
    "Under the law of {l}, may {p} be held liable? They {x}.",
    "Cite a leading case on {m} and state its holding.",
    "Which court has jurisdiction in {l} when {p} {x}?",
    "My grandmother died in {l} without a will. Who inherits her house?",
    "I was arrested in {l} and {p} {x}. Should I say anything to the police?",
    "Summarise the regulation on {m} in {l} for a client.",
    "Which states recognise {m}?",
    "can {p} be charged with a crime if they {x}",
    "What evidence do I need to show that {p} {x}?",
    "Does the GDPR apply when {p} {x}?",
)


def legal(count: int = 900) -> Iterator[str]:
    """Questions of clients about their rights, about notions of law, and about clauses."""
    words = {"p": _PARTIES, "x": _DEEDS, "m": _MATTERS, "n": _MATTERS, "l": _PLACES, "c": _PAPERS}
    return filled("legal", _LEGAL, {**words, "q": _CLAUSES, "r": _CLAUSES}, count)


_FACTS = (
    "{a}, a {o}, agreed in writing to sell a warehouse to {b} for $80,000.",
    "{a} lent a valuable violin to {b}, who is a {o}.",
    "While intoxicated, {a} entered the home of {b}, a {o}, through an open window.",
    "{a} and {b} formed a partnership to run a bakery; {a} put up all of the capital.",
    "{a} posted online that {b}, a well-known {o}, had taken bribes.",
    "A statute requires every {o} to be licensed by the state. {a} hired {b}, who had no licence.",
    "{a}'s will left the farm 'to {b} for life, then to the children of the {o}'.",
    "Officers stopped the car of {a}, a {o}, and found drugs in a bag that belonged to {b}.",
    "{a}, an apprentice of {b}, a {o}, drove the firm's van to lunch and hit a cyclist.",
    "{b}, a {o}, promised to pay the debts of {a}, and {a} gave up a job in reliance on it.",
)
_TURNS = (
    "Before the date agreed, {b} refused to perform.",
    "The building burned down the next day, through no fault of either.",
    "{a} was seriously hurt and brought an action for damages.",
    "The prosecution charged {a} with burglary and conspiracy.",
    "{b} moved to dismiss for lack of personal jurisdiction.",
    "{a} now claims title to the property.",
    "The trial judge admitted the statement over an objection.",
    "The jury found that both had been careless.",
    "{b} argues that no consideration was given.",
    "The appellate court must decide whether the search was lawful.",
)
_ASKED = (
    "If {a} sues {b}, who will prevail?",
    "What is {a}'s best argument?",
    "Is {b} liable?",
    "How should the court rule?",
    "Answer yes or no: does {a} have a cause of action?",
    "Which defence is the strongest?",
    "Decide the case and name the rule that you apply.",
    "What crime, if any, has {a} committed?",
    "Is the agreement enforceable?",
)


def legal_cases(count: int = 300) -> Iterator[str]:
    """Cases to decide, as they are set in exams on contracts, property, crimes and procedure."""
    rng = random.Random("legal cases")
    people = ("Adams", "Baker", "Carla", "Dinesh", "Owner", "Buyer", "Mrs. Ellis", "Fred", "Grant", "Hernandez", "Ivy")
    trades = ("plumber", "surgeon", "dealer", "farmer", "teacher", "builder", "senator", "trustee", "pilot", "minor")
    for _ in range(count):
        a, b = rng.sample(people, 2)
        parts = [rng.choice(_FACTS), *rng.sample(_TURNS, rng.randint(1, 2)), rng.choice(_ASKED)]
        yield " ".join(parts).format(a=a, b=b, o=rng.choice(trades))
