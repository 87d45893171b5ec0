"""Requests for SQL of our own making: other schemas, ways to say what is wanted, and what stands around it.

They are put together from parts, so there is no end of them; the domain they teach is *a question to a database*,
whatever it is about, and not one way to write it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

__all__ = ["schema_requests", "short_requests", "table_requests"]

#: Tables, each with its columns: numbers, texts and a date.
_SCHEMAS: tuple[dict[str, tuple[tuple[str, ...], tuple[str, ...], str]], ...] = (
    {
        "customers": (("id", "credit_limit"), ("name", "city", "segment"), "joined_on"),
        "orders": (("id", "customer_id", "total"), ("status",), "ordered_on"),
    },
    {
        "Teacher": (("TeacherID", "Salary"), ("LastName", "Subject"), "HiredOn"),
        "Course": (("CourseID", "TeacherID", "Credits"), ("Title", "Room"), "StartDate"),
    },
    {
        "patients": (("patient_id", "age"), ("full_name", "ward", "blood_group"), "admitted_at"),
        "treatments": (("treatment_id", "patient_id", "cost"), ("procedure_name",), "performed_at"),
    },
    {
        "lawsuits": (("case_no", "damages"), ("court", "plaintiff", "outcome"), "filed_on"),
        "attorneys": (("attorney_id", "case_no", "hourly_rate"), ("attorney_name", "firm"), "admitted_on"),
    },
    {
        "artists": (("artist_id", "followers"), ("artist_name", "genre", "home_town"), "debut"),
        "tracks": (("track_id", "artist_id", "seconds"), ("track_title",), "released"),
    },
    {
        "Team": (("team_id", "budget"), ("team_name", "stadium"), "founded"),
        "Match": (("match_id", "team_id", "goals"), ("opponent", "referee"), "played_on"),
    },
    {
        "airports": (("airport_key", "elevation"), ("iata", "city", "country"), "opened"),
        "routes": (("route_id", "airport_key", "distance_km"), ("carrier", "aircraft"), "valid_from"),
    },
    {
        "employees": (("emp_no", "salary"), ("first_name", "dept", "job_title"), "hire_date"),
        "projects": (("project_id", "emp_no", "hours"), ("project_name", "client"), "deadline"),
    },
    {
        "sensor_readings": (("reading_id", "value"), ("sensor", "unit"), "recorded_at"),
        "alerts": (("alert_id", "reading_id", "severity"), ("message",), "raised_at"),
    },
    {
        "Recipe": (("RecipeId", "Calories"), ("Name", "Cuisine", "Author"), "Published"),
        "Ingredient": (("IngredientId", "RecipeId", "Grams"), ("Label",), "BestBefore"),
    },
    {
        "accounts": (("account_id", "balance"), ("holder", "branch", "currency"), "opened_on"),
        "transfers": (("transfer_id", "account_id", "amount"), ("reference", "kind"), "booked_on"),
    },
    {
        "movie": (("movie_id", "box_office"), ("title", "director", "language"), "premiere"),
        "rating": (("rating_id", "movie_id", "stars"), ("reviewer",), "rated_on"),
    },
    {
        "vehicles": (("vin", "mileage"), ("make", "model", "colour"), "registered"),
        "repairs": (("repair_id", "vin", "price"), ("workshop", "part"), "repaired_on"),
    },
    {
        "species": (("species_id", "population"), ("latin_name", "habitat", "family"), "first_described"),
        "sightings": (("sighting_id", "species_id", "how_many"), ("observer", "region"), "seen_on"),
    },
)
_QUESTIONS = (
    "How many {t} are there?",
    "How many {t} are there for each {x}?",
    "What is the average {n} of all {t}?",
    "List the {x} and {y} of every {t} whose {n} is above {k}.",
    "Which {x} has the highest total {n}?",
    "Show the {x} of the {t} with the lowest {n}.",
    "Find the {x} of all {t} that have no {u}.",
    "What are the different {x} of the {t}, in alphabetical order?",
    "Give me the top {s} {t} by {n}.",
    "For each {x}, return the number of {u} and the sum of {m}.",
    "What is the {y} of the {t} whose {x} is '{w}'?",
    "Count the {t} since {year} by month of {d}.",
    "Return every {x} that occurs more than {s} times.",
    "Which {t} have a {n} greater than the average?",
    "Find the name of the {x} with at least {s} {u}.",
    "What is the maximum and minimum {m} of {u} for {t} in '{w}'?",
    "Show all {x} together with the {z} of their {u}.",
    "How many different {x} are recorded after {year}?",
    "what percentage of {t} has {n} over {k}",
    "tell me who or what had the most {u} in {year}",
)
_TASKS = (
    "Write an SQL query for this.",
    "Translate the question into SQL.",
    "Answer with one SQLite statement and nothing else.",
    "Give a valid PostgreSQL query that answers the question. No explanation.",
    "You write MySQL. Output only the query.",
    "Turn the request below into a SELECT statement.",
    "You are a careful data analyst. Write the query that answers the user's question.",
    "Using only the tables shown, write T-SQL that answers the question.",
    "As a database assistant, generate a syntactically correct query for the question. Never query all columns.",
    "Convert natural language to SQL.",
    "Act as a text-to-SQL system: respond with the final statement only.",
)
_ORDERS = (
    "{task}\n\n{schema}\n\n{question}",
    "{task}\n{question}\n\n{schema}",
    "{schema}\n\n{task}\n{question}",
    "{schema}\n-- {question}",
    "### Schema\n{schema}\n\n### Question\n{question}\n\n### SQL",
    "{task}\nDatabase:\n{schema}\nQ: {question}\nA:",
    "I have these tables:\n{schema}\n{question}",
    "{question}\n{schema}",
    "{question}",
    "{question} {task}",
    "Question: {question}\nSQL query:",
)


def _ddl(schema: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]) -> str:
    tables = []
    for name, (numbers, texts, date) in schema.items():
        columns = [f"{numbers[0]} INTEGER PRIMARY KEY", *(f"{c} INTEGER" for c in numbers[1:])]
        columns += [*(f"{c} VARCHAR(80)" for c in texts), f"{date} DATE"]
        tables.append(f"CREATE TABLE {name} (\n  " + ",\n  ".join(columns) + "\n);")
    return "\n".join(tables)


def _columns(schema: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]) -> dict[str, list[str]]:
    return {name: [*numbers, *texts, date] for name, (numbers, texts, date) in schema.items()}


def _brief(schema: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]) -> str:
    return "\n".join(f"{name}({', '.join(columns)})" for name, columns in _columns(schema).items())


def _prose(schema: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]) -> str:
    return " ".join(f"The table {name} has the columns {', '.join(c)}." for name, c in _columns(schema).items())


def _listed(schema: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]) -> str:
    return "\n".join(f"- {name}: " + " | ".join(columns) for name, columns in _columns(schema).items())


def _quoted(schema: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]) -> str:
    return "\n".join(f'"{name}": {columns}' for name, columns in _columns(schema).items())


_FORMS: tuple[Callable[[dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]], str], ...]
_FORMS = (_ddl, _brief, _prose, _listed, _quoted)


def schema_requests(count: int = 1500) -> Iterator[str]:
    """Questions to a database that is described, or not; some with instructions before, some after."""
    rng = random.Random("schema requests")
    for _ in range(count):
        schema = rng.choice(_SCHEMAS)
        (t, (numbers, texts, date)), (u, (others, more, _)) = rng.sample(list(schema.items()), 2)
        question = rng.choice(_QUESTIONS).format(
            t=t,
            u=u,
            x=rng.choice(texts),
            y=rng.choice((*texts, date)),
            z=rng.choice(more),
            n=rng.choice(numbers),
            m=rng.choice(others),
            d=date,
            k=rng.choice((5, 20, 100, 2500, 50000)),
            s=rng.choice((2, 3, 5, 10)),
            w=rng.choice(("Berlin", "Spring", "north", "Kim", "A1")),
            year=rng.choice((1998, 2010, 2019, 2024)),
        )
        # Without a description or the word, nothing tells a question to a database from one to anybody.
        order = rng.choice([o for o in _ORDERS if "{schema}" in o or "SQL" in o or "{task}" in o])
        yield order.format(task=rng.choice(_TASKS), schema=rng.choice(_FORMS)(schema), question=question)


_SUBJECTS = (
    "a LEFT JOIN",
    "a window function",
    "GROUP BY with HAVING",
    "a common table expression",
    "a foreign key",
    "a composite index",
    "a stored procedure",
    "a trigger",
    "a materialized view",
    "a correlated subquery",
    "UNION ALL",
    "an upsert",
    "a transaction",
    "a partial index",
    "a recursive query",
    "NULL in comparisons",
    "table partitioning",
    "a primary key",
    "COALESCE",
    "ROW_NUMBER",
    "a self join",
    "EXPLAIN ANALYZE",
    "a deadlock",
    "third normal form",
    "a vector index in a database",
)
_SYSTEMS = ("PostgreSQL", "MySQL", "SQLite", "SQL Server", "Oracle", "DuckDB", "Snowflake", "BigQuery", "MariaDB")
_SHORT = (
    "What is {s} in {db}?",
    "When should I use {s}?",
    "Show me an example of {s} in {db}.",
    "How does {s} work in SQL?",
    "Why is my {db} query with {s} so slow?",
    "Explain {s} to a beginner in databases.",
    "{db}: how do I add {s} to an existing table?",
    "difference between {s} and a plain query in {db}",
    "How can I rewrite this without {s}?\n{q}",
    "What does this query return?\n{q}",
    "Optimise this {db} statement:\n{q}",
    "I get a syntax error in {db}. What is wrong?\n\n{q}",
    "Add {s} to the following statement: {q}",
    "Convert this from {db} to {other}:\n{q}",
    "{q}",
    "Complete the query:\n{half}",
)
_QUERIES = (
    "SELECT {x}, COUNT(*) FROM {t} GROUP BY {x} HAVING COUNT(*) > {s}",
    "SELECT * FROM {t} WHERE {n} > {k} ORDER BY {x} LIMIT {s}",
    "SELECT a.{x}, b.{z} FROM {t} a JOIN {u} b ON a.{n} = b.{n}",
    "UPDATE {t} SET {x} = 'new' WHERE {n} = {k};",
    "INSERT INTO {t} ({x}, {n}) VALUES ('A', {k});",
    "DELETE FROM {t} WHERE {n} IN (SELECT {n} FROM {u});",
    "WITH best AS (SELECT {x}, MAX({n}) AS top FROM {t} GROUP BY {x}) SELECT * FROM best WHERE top > {k}",
    "ALTER TABLE {t} ADD COLUMN {z} TEXT NOT NULL DEFAULT '';",
    "SELECT {x}, {n}, RANK() OVER (PARTITION BY {x} ORDER BY {n} DESC) FROM {t}",
)


def short_requests(count: int = 800) -> Iterator[str]:
    """Questions about SQL itself, and statements to explain, mend or translate."""
    rng = random.Random("short requests")
    for _ in range(count):
        schema = rng.choice(_SCHEMAS)
        (t, (numbers, texts, _)), (u, (_, more, _)) = rng.sample(list(schema.items()), 2)
        query = rng.choice(_QUERIES).format(
            t=t,
            u=u,
            x=rng.choice(texts),
            z=rng.choice(more),
            n=rng.choice(numbers),
            k=rng.choice((5, 100, 2500)),
            s=rng.choice((2, 5, 10)),
        )
        db, other = rng.sample(_SYSTEMS, 2)
        yield rng.choice(_SHORT).format(
            s=rng.choice(_SUBJECTS), db=db, other=other, q=query, half=query[: rng.randint(10, 30)]
        )


def table_requests() -> Iterator[str]:
    """Requests for queries, each over one table."""
    tables = {
        "customers": ("id", "name", "city", "country"),
        "orders": ("id", "customer_id", "total", "placed_on"),
        "employees": ("id", "name", "salary", "department"),
        "flights": ("number", "origin", "destination", "departure"),
        "books": ("isbn", "title", "author", "year"),
        "students": ("id", "name", "grade", "school"),
    }
    forms = (
        "Write a SQL query that lists {a} and {b} of all {t}.",
        "CREATE TABLE {t} ({a}, {b}, {c}); How many {t} are there for each {c}? Answer in SQL.",
        "Which SQL statement returns the {t} with the largest {c}?",
        "SELECT {a}, {b} FROM {t} WHERE {c} = 'x' ORDER BY {a}; -- what is wrong with this query?",
        "Given the schema {t}({a}, {b}, {c}), find every {b} that appears more than once, in SQLite.",
        "Join {t} with another table on {a} and count the rows for each {b}.",
        "How do I add an index on {c} of the table {t} in PostgreSQL?",
        "Delete the rows of {t} whose {c} is null.",
    )
    for (table, columns), form in itertools.product(tables.items(), forms):
        for a, b, c in itertools.permutations(columns, 3):
            yield form.format(t=table, a=a, b=b, c=c)
