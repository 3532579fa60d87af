"""The string primitives: functions of a text and their arguments, whose own source is also the truth in code."""

__all__ = ["HELPERS", "PRIMITIVES"]


def spell(n):
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    words = (small + " eighteen nineteen twenty").split()
    if n <= 20:
        return words[n]
    if n < 30:
        return "twenty-" + words[n - 20]
    return "thirty" if n == 30 else str(n)


def is_letter(c):
    return "a" <= c <= "z" or "A" <= c <= "Z"


def turn(c, k):
    if not is_letter(c):
        return c
    start = ord("a") if c >= "a" else ord("A")
    return chr((ord(c) - start + k) % 26 + start)


def place(c):
    return ord(c.lower()) - ord("a") + 1 if is_letter(c) else 0


def middle(s):
    return s[(len(s) - 1) // 2 : len(s) // 2 + 1]


def lower(s):
    return s.lower()


def upper(s):
    return s.upper()


def capitalize(s):
    return s.capitalize()


def alternate_case(s):
    return "".join(c.lower() if i % 2 else c.upper() for i, c in enumerate(s))


def reverse(s):
    return s[::-1]


def reverse_first_half(s):
    return s[: len(s) // 2][::-1] + s[len(s) // 2 :]


def reverse_last_half(s):
    return s[: len(s) // 2] + s[len(s) // 2 :][::-1]


def reverse_words(s):
    return " ".join(word[::-1] for word in s.split(" "))


def swap_ends(s):
    return s if len(s) < 2 else s[-1] + s[1:-1] + s[0]


def swap_positions(s, i, j):
    if max(i, j) >= len(s):
        return s
    letters = list(s)
    letters[i], letters[j] = letters[j], letters[i]
    return "".join(letters)


def swap_vowels(s):
    vowels = [c for c in s if c in "aeiouAEIOU"]
    return "".join(vowels.pop() if c in "aeiouAEIOU" else c for c in s)


def spell_digits(s):
    return " ".join(spell(int(c)) for c in s if c in "0123456789")


def drop_digits(s):
    return "".join(c for c in s if c not in "0123456789")


def keep_capitals(s):
    return "".join(c for c in s if c.isupper())


def drop_spaces(s):
    return "".join(s.split())


def drop_repeats(s):
    return "".join(dict.fromkeys(s))


def strip(s):
    return s.strip()


def strip_left(s):
    return s.lstrip()


def strip_right(s):
    return s.rstrip()


def first(s):
    return s[:1]


def last(s):
    return s[-1:]


def middle_characters(s):
    return middle(s)


def vowels_to_letter(s, c):
    return "".join(c if one in "aeiouAEIOU" else one for one in s)


def vowels_to_first(s):
    return vowels_to_letter(s, s[:1])


def vowels_to_last(s):
    return vowels_to_letter(s, s[-1:])


def vowels_to_middle(s):
    return vowels_to_letter(s, middle(s)[:1])


def vowels_to_counted(s):
    count = sum(c in "aeiouAEIOU" for c in s)
    return vowels_to_letter(s, s[count - 1]) if count else s


def count_vowels(s):
    return spell(sum(c in "aeiouAEIOU" for c in s))


def count_consonants(s):
    return spell(sum(is_letter(c) and c not in "aeiouAEIOU" for c in s))


def count_capitals(s):
    return spell(sum(c.isupper() for c in s))


def count_small(s):
    return spell(sum(c.islower() for c in s))


def count_letter(s, c):
    return spell(s.count(c))


def count_substring(s, part):
    return spell(s.count(part))


def count_characters(s):
    return spell(len(s))


def position_of_letter(s, c):
    return spell(s.find(c)) if c in s else "none"


def indexes_of_digits(s):
    return " ".join(spell(i) for i, c in enumerate(s) if c in "0123456789")


def indexes_of_letters(s):
    return " ".join(spell(i) for i, c in enumerate(s) if is_letter(c))


def ordinal_of_first(s):
    return spell(place(s[:1] or " "))


def ordinal_of_last(s):
    return spell(place(s[-1:] or " "))


def ordinal_of_middle(s):
    return spell(place(middle(s)[:1] or " "))


def caesar(s, k):
    return "".join(turn(c, k) for c in s)


def shift_by_character(s, i, sign):
    k = place(s[i]) if i < len(s) else 0
    return "".join(turn(c, sign * k) for c in s).lower()


def shift_by_length(s):
    return "".join(turn(c, len(s)) for c in s)


def shift_middle(s, k):
    at = len(s) // 2
    return s[:at] + turn(s[at], k) + s[at + 1 :] if len(s) % 2 and len(s) >= 3 else s


def shift_middle_by_length(s):
    return shift_middle(s, len(s))


def shift_at(s, j, k):
    return s[:j] + turn(s[j], k) + s[j + 1 :] if j < len(s) else s


def insert_middle(s, c):
    return s[: len(s) // 2] + c + s[len(s) // 2 :]


def append_letter(s, c):
    return s if s.endswith(c) else s + c


def append_text(s, text):
    return s + text


def append_first(s):
    return s + s[:1]


def append_last(s):
    return s + s[-1:]


def append_middle(s):
    return s + middle(s)


def replace_letter(s, a, b):
    return s.replace(a, b)


def delete_letter(s, c):
    return s.replace(c, "")


def split_on(s, c):
    return " ".join(s.split(c))


def permute_alphabet(s, alphabet):
    return "".join(alphabet[ord(c) - ord("a")] if "a" <= c <= "z" else c for c in s.lower())


def step_without_turn(c, k):
    if not is_letter(c):
        return c
    if k > 0 and c in "zZ":
        return "a" if c == "z" else "A"
    if k < 0 and c in "aA":
        return "z" if c == "a" else "Z"
    return chr(ord(c) + k)


def shift_first(s, k):
    return step_without_turn(s[0], k) + s[1:] if s else s


def shift_last(s, k):
    return s[:-1] + step_without_turn(s[-1], k) if s else s


HELPERS = (spell, is_letter, turn, place, middle, step_without_turn, vowels_to_letter, shift_middle)
"""What several of them call."""

PRIMITIVES = {
    lower: "in small letters",
    upper: "in capitals",
    capitalize: "with a capital first and small letters after",
    alternate_case: "in alternating case, even positions in capitals",
    reverse: "reversed",
    reverse_first_half: "with its first half reversed",
    reverse_last_half: "with its last half reversed",
    reverse_words: "with each word reversed",
    swap_ends: "with first and last character swapped",
    swap_positions: "with characters {0} and {1} swapped",
    swap_vowels: "with its vowels in reverse order",
    spell_digits: "its digits, spelled",
    drop_digits: "without digits",
    keep_capitals: "its capitals only",
    drop_spaces: "without white space",
    drop_repeats: "without repeated characters",
    strip: "without white space at its ends",
    strip_left: "without white space at its start",
    strip_right: "without white space at its end",
    first: "its first character",
    last: "its last character",
    middle_characters: "its middle character, two where the length is even",
    vowels_to_letter: "with vowels replaced by {0}",
    vowels_to_first: "with vowels replaced by its first character",
    vowels_to_last: "with vowels replaced by its last character",
    vowels_to_middle: "with vowels replaced by its middle character",
    vowels_to_counted: "with vowels replaced by the character whose number is the count of vowels",
    count_vowels: "the count of vowels, spelled",
    count_consonants: "the count of consonants, spelled",
    count_capitals: "the count of capitals, spelled",
    count_small: "the count of small letters, spelled",
    count_letter: "how often {0} is in it, spelled",
    count_substring: "how often {0} is in it, spelled",
    count_characters: "its length, spelled",
    position_of_letter: "the index of the first {0}, spelled, or none",
    indexes_of_digits: "the indexes of its digits, spelled",
    indexes_of_letters: "the indexes of its letters, spelled",
    ordinal_of_first: "the place in the alphabet of its first letter, spelled",
    ordinal_of_last: "the place in the alphabet of its last letter, spelled",
    ordinal_of_middle: "the place in the alphabet of its middle letter, spelled",
    caesar: "with every letter shifted by {0}",
    shift_by_character: "in small letters, each shifted by {1} times the place in the alphabet of character {0}",
    shift_by_length: "with every letter shifted by the length",
    shift_middle: "with the middle letter shifted by {0}",
    shift_middle_by_length: "with the middle letter shifted by the length",
    shift_at: "with letter {0} shifted by {1}",
    insert_middle: "with {0} inserted in the middle",
    append_letter: "with {0} at its end unless it is there",
    append_text: "with {0} appended",
    append_first: "with its first character appended",
    append_last: "with its last character appended",
    append_middle: "with its middle character appended",
    replace_letter: "with {0} replaced by {1}",
    delete_letter: "without {0}",
    split_on: "split at {0}, joined by spaces",
    permute_alphabet: "in small letters, each replaced by the alphabet {0}",
    shift_first: "with the first letter shifted by {0}, only z and a turning over",
    shift_last: "with the last letter shifted by {0}, only z and a turning over",
}
"""The primitives with what they give of a text in words, arguments as {0} and {1}."""
