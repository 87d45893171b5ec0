"""Requests of our own making for the domains whose packages hold exams only: what people ask in a line or two."""

from __future__ import annotations

from collections.abc import Iterator

from .filling import filled, parts

__all__ = ["code", "german", "instruction", "mathematics", "medical"]

_ILLNESSES = parts(
    "asthma|psoriasis|kidney stones|gout|shingles|migraine|type 2 diabetes|celiac "
    "disease|anemia|sciatica|tinnitus|hypothyroidism|appendicitis|eczema|high blood pressure|lupus|pneumonia|a "
    "sinus infection|plantar fasciitis|endometriosis|gallstones|heart failure|hepatitis B|IBS|Crohn's "
    "disease|osteoporosis|a concussion|measles|strep throat|acid reflux|carpal tunnel syndrome|atrial "
    "fibrillation|glaucoma|sleep apnea|scabies|Parkinson's disease|multiple sclerosis|a urinary tract "
    "infection|vertigo|ringworm|varicose veins|sepsis|a herniated "
    "disc|bronchitis|hemorrhoids|chickenpox|cataracts|cystic fibrosis|Marfan syndrome|pink eye"
)
_SIGNS = parts(
    "a stiff neck|night sweats|numb fingers|a rash on both arms|chest pain when I breathe|swollen ankles|blurred "
    "vision|constant fatigue|a dry cough|blood in my urine|hair loss|heart palpitations|a lump in the "
    "breast|dizziness|pain behind the knee|nausea after meals|itchy skin|a low fever|shortness of breath|ringing in"
    " the ears|hiccups|a twitching eyelid|cold hands|heartburn|cramps in the calf|dry mouth|joint pain|a sore "
    "throat"
)
_DRUGS = parts(
    "ibuprofen|metformin|lisinopril|amoxicillin|warfarin|sertraline|prednisone|omeprazole|levothyroxine|atorvastatin|insulin"
    " glargine|albuterol|gabapentin|aspirin|methotrexate|paracetamol|codeine|fluconazole|losartan|melatonin|vitamin"
    " D|iron tablets|clopidogrel|doxycycline|tramadol|cetirizine|hydrocortisone cream|naproxen"
)
_TESTS = parts(
    "an MRI of the knee|a colonoscopy|a blood glucose test|a chest X-ray|an ECG|a biopsy|a hip "
    "replacement|dialysis|chemotherapy|a cesarean section|cataract surgery|a vaccination against "
    "flu|physiotherapy|a bone density scan|an endoscopy|a root canal|a thyroid ultrasound|a stem cell transplant"
)
_MEDICAL = (
    "What are the symptoms of {i}?",
    "What causes {s}?",
    "How is {i} diagnosed?",
    "How is {i} treated?",
    "Is {i} contagious?",
    "Can {i} be cured?",
    "Who is at risk of {i}?",
    "Why do I have {s}?",
    "How long does {i} last?",
    "What helps against {s}?",
    "Should I see a doctor about {s}?",
    "What are the side effects of {d}?",
    "Can I take {d} together with {e}?",
    "How much {d} may an adult take in a day?",
    "How does {d} work?",
    "Is {d} safe during pregnancy?",
    "What happens during {t}?",
    "How do I prepare for {t}?",
    "How long is the recovery after {t}?",
    "I have had {s} for two weeks and now also {z}. What could it be?",
    "My mother is {a} and has {i}. She takes {d}. Is {s} normal?",
    "My son has {s} and {z}, no other complaints. What should we do?",
    "What is the difference between {i} and {j}?",
    "What does it mean when you have {s} and {z}?",
    "Foods to avoid with {i}",
    "Is {s} a sign of {i}?",
    "How common is {i} in people over {a}?",
    "What is the outlook for someone with {i}?",
    "Does {i} run in families?",
    "A {a}-year-old patient presents with {s} and {z}. What is the most likely diagnosis?",
    "Write a discharge letter for a {a}-year-old patient treated for {i} with {d}.",
    "Explain {t} to a patient in simple words.",
    "Which class of drugs does {d} belong to, and when is it contraindicated?",
    "I forgot to take my {d} this morning, should I double the next dose?",
    "Hi doctor, I am {a} years old and was told I have {i}. I was prescribed {d}, but I am worried about {s}. "
    "What else can I do? Thanks.",
    "are there home remedies for {s}?",
    "how to tell if it is {i}",
    "early warning signs of {i}",
    "Can stress cause {s}?",
    "vaccine or medicine to prevent {i}?",
)


def medical(count: int = 900) -> Iterator[str]:
    """Questions of patients, and a few of doctors."""
    ages = tuple(map(str, range(19, 90, 7)))
    words = {"i": _ILLNESSES, "j": _ILLNESSES, "s": _SIGNS, "z": _SIGNS, "d": _DRUGS, "e": _DRUGS, "t": _TESTS}
    return filled("medical", _MEDICAL, {**words, "a": ages}, count)


_GERMAN = (
    "Wie kann ich {t}?",
    "Schreibe {d} über {n}.",
    "Erkläre mir {n} in einfachen Worten.",
    "Was ist der Unterschied zwischen {n} und {m}?",
    "Kannst du mir helfen, {t} zu können? Ich habe wenig Zeit.",
    "Fasse den folgenden Text zusammen: {s} {z}",
    "{s} {z}\n\nWorum geht es in diesem Text?",
    "Welche Rolle spielt {n} im Alltag?",
    "Übersetze ins Englische: {s}",
    "Korrigiere die Rechtschreibung: {s}",
    "Nenne drei Gründe, warum {n} wichtig ist.",
    "Du bist ein hilfreicher Assistent. Antworte kurz.\n\n{s} Was soll ich tun?",
    "Welche Aussage über {n} trifft zu?\nA) Es gibt sie erst seit 1950.\nB) Sie ist in Europa verbreitet.\n"
    "C) Sie kostet viel Geld.\nD) Keine der Aussagen.",
    "Wann wurde {n} zum ersten Mal erwähnt, und von wem?",
    "Wie viele Menschen beschäftigen sich mit {n}?",
    "Ich möchte {t}. Gib mir einen Plan für eine Woche.",
    "Stimmt es, dass {n} früher anders aussah?",
    "Berechne: Ein Zug fährt mit 80 km/h. Wie weit kommt er in drei Stunden?",
    "Schreibe ein Programm, das {n} verwaltet.",
    "Was kostet es, wenn ich {t} will?",
    "hallo, wie geht's? {s}",
    "Bitte beantworte die Frage mit einem Buchstaben. Was gehört zu {n}? a) Wasser b) Stein c) Luft d) Feuer",
    "Beschreibe die Geschichte und die Bedeutung von {n} in einem Absatz.",
    "Gibt es {n} auch in Österreich und in der Schweiz?",
)
_NOUNS = parts(
    "die Photosynthese|der Wald|das Grundgesetz|die Energiewende|der Klavierunterricht|die Französische "
    "Revolution|das Immunsystem|der Mond|die Inflation|das Fahrrad|die Demokratie|der Rhein|die Grammatik|das "
    "Brot|der Zweite Weltkrieg|die Schwerkraft|der Fußball|das Theater|die Bibliothek|der Datenschutz|die Zelle|das"
    " Eisen"
)
_DOINGS = parts(
    "besser schlafen|Gitarre lernen|Geld sparen|einen Garten anlegen|mich auf eine Prüfung vorbereiten|nach München"
    " umziehen|gesünder kochen|einen Brief an das Amt schreiben|meinen Computer reparieren|ein Zelt aufbauen"
)
_WORKS = ("ein Gedicht", "einen Aufsatz", "eine E-Mail", "eine Geschichte", "einen Witz", "eine Rede")
_SENTENCES = parts(
    "Mein Nachbar spielt jeden Abend Trompete.|Gestern hat es den ganzen Tag geregnet, und der Keller steht unter "
    "Wasser.|Die Schüler untersuchten, wie sich Pflanzen an trockene Standorte anpassen.|Im Jahr 1871 wurde das "
    "Deutsche Reich gegründet.|Der Vertrag läuft am Ende des Monats aus.|Die Stadt plant eine neue Brücke über den "
    "Fluss.|Seit der Reform dauert das Studium sechs Semester.|Sie hat ihren Schlüssel im Zug vergessen.|Das Gemüse"
    " wird klein geschnitten und in heißem Öl angebraten.|Viele Vögel ziehen im Herbst nach Süden."
)


def german(count: int = 500) -> Iterator[str]:
    """Requests in German, of all sorts."""
    words = {"n": _NOUNS, "m": _NOUNS, "t": _DOINGS, "d": _WORKS, "s": _SENTENCES, "z": _SENTENCES}
    return filled("german", _GERMAN, words, count)


_LANGUAGES = parts("Python|JavaScript|C#|Java|Rust|Go|C++|TypeScript|Kotlin|PHP|Ruby|Bash|Haskell|Swift|R")
_CHORES = parts(
    "reverse a linked list|read a CSV file|sort a list of objects by two fields|parse JSON|remove duplicates from "
    "an array|make an HTTP request with a timeout|flatten nested lists|count the words of a file|find the longest "
    "common prefix|check whether a string is a palindrome|merge two dictionaries|filter a list by a "
    "predicate|memoise a function|compute the nth Fibonacci number|walk a directory tree|implement a stack|format a"
    " date|group items by key|generate random passwords|validate an email address|split text into chunks|start a "
    "thread|write unit tests for a parser|implement binary search|compute a moving average|find all prime numbers "
    "below n"
)
_SNIPPETS = (
    "for (let i = 0; i <= items.length; i++) {\n  console.log(items[i].name);\n}",
    "def f(xs):\n    return [x for x in xs if x % 2 == 0]",
    'public static void main(String[] args) {\n    System.out.println("Hi")\n}',
    'fn main() {\n    let v = vec![1, 2, 3];\n    let w = v;\n    println!("{:?}", v);\n}',
    "int *p = malloc(10);\nfor (int i = 0; i < 10; i++) p[i] = i;",
    "while True print('hello')",
    "var evens = numbers.Where(n => n % 2 == 0).Select(n => n * n).ToList();",
    "const total = cart.reduce((sum, item) => sum + item.price, 0)",
    "squares = map(lambda x: x ** 2, range(10))",
    "func add(a int, b int) int {\n\treturn a + b\n}",
    "if x = 3:\n    y = x + 1\n  else:\n    y = 0",
    "class Node:\n    def __init__(self, value):\n        self.value = value\n        self.next = None",
    "grep -R 'TODO' src | wc -l",
    "<ul class='menu'><li>Home</li></ul>",
)
_ERRORS = (
    "TypeError: 'NoneType' object is not iterable",
    "NullPointerException",
    "IndexError: list index out of range",
)
_CODE = (
    "How do I {c} in {l}?",
    "Write a {l} function to {c}.",
    "Write {l} code that can {c}, and add comments.",
    "What does this code do?\n\n{s}",
    "Find the bug:\n```\n{s}\n```",
    "Is the following valid {l}?\n{s}",
    "Rewrite this in {l}:\n{s}",
    "What is the output of this program?\n{s}",
    "I get the error {e} when I {c} in {l}. Why?",
    "Refactor the code below so that it is easier to test.\n\n{s}",
    "Does this snippet compile? Answer yes or no. {s}",
    "Give me a one-liner in {l} to {c}.",
    "{s}\n\nExplain the code line by line.",
    "What comes next in this code?\n{s}",
    "Implement a class in {l} with methods to {c} and {d}.",
    "Complete the function.\n\n{s}",
    "What is the fastest way to {c} in {l}?",
    "You are a senior {l} developer. Review this change:\n{s}",
    "Translate this {l} code to Python: {s}",
    "{s}",
    "My {l} program should {c}, but it crashes with {e}. Here is the code:\n{s}",
    "Use a comprehension or a lambda in {l} to {c}.",
    "Explain the difference between a class and an interface in {l}.",
    "Given a list of integers, {c} without using a library. Use {l}.",
)


def code(count: int = 700) -> Iterator[str]:
    """Questions of programmers, with and without a few lines of code, in a number of languages."""
    words = {"c": _CHORES, "d": _CHORES, "l": _LANGUAGES, "s": _SNIPPETS, "e": _ERRORS}
    return filled("code", _CODE, words, count)


_TOPICS = parts(
    "the Roman Empire|coffee|owning a dog|climate change|jazz|volcanoes|public libraries|time "
    "travel|chess|minimalism|the moon landing|photography|beekeeping|tea ceremonies|electric cars|remote "
    "work|Shakespeare|friendship|bread|the Olympics|dinosaurs|gardening|rivers|space tourism|good "
    "manners|dreams|tattoos|the Silk Road|penguins"
)
_AIMS = parts(
    "learn to swim|find a hobby|plan a birthday party|write a cover letter|stop procrastinating|pack for a weekend "
    "in Lisbon|choose a first camera|apologise to a friend|grow tomatoes on a balcony|make small talk|cook "
    "rice|clean a carpet|train a puppy|save water at home|name a cat|decorate a small flat"
)
_INSTRUCTION = (
    "Write {k} about {t}.",
    "How can I {a}?",
    "Give me five tips to {a}.",
    "Tell me something surprising about {t}.",
    "Why do people like {t}?",
    "Who was the first person to write about {t}?",
    "What is the history of {t}?",
    "Where does {t} come from?",
    "Rewrite this to sound more friendly: I want you to {a} by Friday.",
    "Pretend you are an expert on {t} and answer my questions.",
    "Compare {t} and {u} in a short paragraph.",
    "Is {t} overrated? Argue both sides.",
    "Suggest a title for {k} on {t}.",
    "what should i know about {t} before i {a}",
    "Make a list of ten questions about {t} for a quiz.",
    "I feel bored today. Should I read about {t} or {a}?",
    "Hello! Can you help me {a}?",
    "Summarise what is known about {t} for a twelve-year-old.",
    "When did {t} become popular, and where?",
    "Translate into French: I would like to {a}.",
    "Correct the grammar: she have never like {t}.",
    "Continue the story: Nobody in the village had heard of {t} until one morning...",
    "What happens if you never {a}?",
    "Which is better, {t} or {u}?",
)
_KINDS = ("a poem", "a short story", "an email", "a speech", "a haiku", "a blog post", "a slogan", "a dialogue")


def instruction(count: int = 600) -> Iterator[str]:
    """What anybody asks an assistant: to write, to explain, to advise."""
    return filled("instruction", _INSTRUCTION, {"t": _TOPICS, "u": _TOPICS, "a": _AIMS, "k": _KINDS}, count)


_OBJECTS = ("apples", "tickets", "litres of paint", "pages", "chairs", "kilometres", "marbles", "stamps", "bricks")
_NUMBERS = tuple(map(str, (3, 4, 7, 8, 12, 15, 20, 24, 36, 45, 60, 75, 90, 120, 250)))
_NOTIONS = parts(
    "the Pythagorean theorem|a prime number|the quadratic formula|an eigenvalue|standard deviation|Bayes' theorem|a"
    " geometric series|the chain rule|a matrix inverse|the binomial theorem|modular arithmetic|the law of cosines|a"
    " group homomorphism|the central limit theorem|integration by parts|a logarithm|conditional probability"
)
_MATHEMATICS = (
    "Explain {n} with an example.",
    "Prove {n}.",
    "What is {a} percent of {b}?",
    "{a} workers need {b} days for a wall. How long do {c} workers need?",
    "A shop sells {o} at ${a} each. Anna buys {b} of them and pays with ${c}. How much change does she get?",
    "Solve for x: {a}x + {b} = {c}",
    "Solve the system: {a}x + y = {b}, x - y = {c}.",
    "What is the derivative of {a}x^3 - {b}x + {c}?",
    "Find the roots of x^2 - {b}x + {a} = 0.",
    "Compute {a} * {b} - {c}",
    "A bag holds {a} red and {b} blue balls. Two are drawn without replacement. What is the probability that both are "
    "red?",
    "The perimeter of a rectangle is {c} cm and one side is {a} cm. What is its area?",
    "What is the remainder when {a}^{b} is divided by {c}?",
    "If f(x) = {a}x^2 + {b}, find f({c}). (a) {b} (b) {c} (c) {a} (d) none of these",
    "Tom has {a} {o}, Lisa has {b} more than Tom, and together with Ben they have {c}. How many does Ben have?",
    "Evaluate the integral of {a}x from 0 to {b}.",
    "The sum of two consecutive integers is {c}. Which are they?",
    "Two dice are rolled {a} times. What is the expected number of double sixes?",
    "Let $a_n = {a}n + {b}$. Find $a_{{{c}}}$.",
    "What is the average of {a}, {b} and {c}?",
    "Use {n} to solve this: the sides are {a}, {b} and {c}.",
    "A car drives {a} km in {b} minutes. What is its speed in km/h?",
)


def mathematics(count: int = 500) -> Iterator[str]:
    """Exercises and questions about notions of mathematics."""
    words = {"n": _NOTIONS, "a": _NUMBERS, "b": _NUMBERS, "c": _NUMBERS, "o": _OBJECTS}
    return filled("mathematics", _MATHEMATICS, words, count)
