//! What English prompts are put together from. Where subjects may be plural, they stand as an object or behind a preposition, so that no
//! verb has to agree with them. `{a}` is the subject with its article, `{q}` a text to be shown, in its quotes.

use super::{Kind, Look, Pools, parts};

/// Words that begin a name which takes no article: plurals, and what cannot be counted.
const WITHOUT_ARTICLE: [&str; 27] = [
    "bare feet",
    "basalt columns",
    "bibimbap in",
    "campers ",
    "chalk writing",
    "children ",
    "fish and chips",
    "friends ",
    "graffiti on",
    "hands ",
    "ink on",
    "ivy on",
    "mother and",
    "moss on",
    "northern lights",
    "packaging of",
    "people ",
    "rain over",
    "rapids in",
    "runner's legs",
    "shakshuka in",
    "sheet music",
    "skywriting",
    "students ",
    "tofu in",
    "twin sisters",
    "vegetable tempura",
];

/// Words that begin with the letter of a vowel and the sound of a consonant, or the other way round.
const LIKE_CONSONANTS: [&str; 8] = ["eu", "ewe", "one", "ubiq", "uni", "use", "usu", "ute"];
const LIKE_VOWELS: [&str; 4] = ["heir", "honest", "honour", "hour"];

/// The subject as a sentence takes it.
pub(super) fn with_article(name: &str) -> String {
    let lower = name.to_lowercase();
    if WITHOUT_ARTICLE.iter().any(|start| lower.starts_with(start)) {
        return name.into();
    }
    let begins = |list: &[&str]| list.iter().any(|start| lower.starts_with(start));
    let vowel = lower.starts_with(['a', 'e', 'i', 'o', 'u']) && !begins(&LIKE_CONSONANTS) || begins(&LIKE_VOWELS);
    format!("{} {name}", if vowel { "an" } else { "a" })
}

/// The pools of a kind.
pub(super) fn pools(kind: Kind) -> Pools {
    let (light, frame, mood) = match kind.look() {
        Look::Photograph => (LIGHT, FRAME, MOOD),
        Look::Drawing => (COLOUR, HAND, CHARM),
        Look::Layout => (COLOUR_PLAN, GRID, USE),
    };
    Pools {
        openings: openings(kind),
        quoted: QUOTED,
        light,
        frame,
        mood,
        parts: match kind.look() {
            Look::Photograph => &parts::ENGLISH_LIGHT,
            _ => &parts::ENGLISH_COLOURS,
        },
    }
}

fn openings(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Thing => THING,
        Kind::Dish => DISH,
        Kind::Plant => PLANT,
        Kind::Place => PLACE,
        Kind::Room => ROOM,
        Kind::View => VIEW,
        Kind::Animal => ANIMAL,
        Kind::Person => PERSON,
        Kind::Action => ACTION,
        Kind::Figure => FIGURE,
        Kind::Artwork => ARTWORK,
        Kind::Cartoon => CARTOON,
        Kind::Design => DESIGN,
        Kind::Sheet => SHEET,
        Kind::Screen => SCREEN,
        Kind::Sign => SIGN,
    }
}

const THING: &[&str] = &[
    "On a scratched oak table near the window, the camera rests on {a} that has clearly been used for years.",
    "A close view of {a}, placed alone on a sheet of grey linen, invites the eye to wander over every edge.",
    "Half in shadow on an attic shelf, between rolled maps and dusty jars, one discovers {a}.",
    "Seen from straight above, the picture arranges loose pins, a ribbon and a dried leaf around {a}.",
    "Nothing distracts from {a}, set on a plain stone block in the middle of an empty room.",
    "Through the glass of a shop window at dusk we catch sight of {a} among a few modest neighbours.",
    "From a low angle the lens looks up at {a}, which seems larger than it could ever be.",
    "Somebody has left {a} on the wet planks of a jetty, and drops of rain still cling to it.",
    "In a bright workshop, with wood shavings curling on the floor, a bench carries {a}.",
    "Tucked into the corner of a velvet armchair, under a knitted throw, lies {a}.",
];

const DISH: &[&str] = &[
    "Fresh from the kitchen and still steaming, {a} has just been put down on a dark slate board.",
    "A food photographer has caught {a} from the side, close enough to count the crumbs beside it.",
    "Under the striped awning of a small street stall, a cook hands over {a} on brown paper.",
    "Straight from above, the picture shows {a} on a round plate with a chipped blue rim.",
    "A wooden tray on rumpled bed linen carries {a}, a folded napkin and a sprig of mint.",
    "Beside an open window with herbs on the sill, a rustic table has been laid with {a}.",
    "On the counter of a tiny restaurant, in front of blurred shelves of bottles, waits {a}.",
    "Hands reach in from both sides of the picture to share {a} at the end of a long day.",
    "A checked blanket in tall grass, a jug of water and {a} make up a simple picnic.",
    "Arranged like a still life of an old master, {a} rests between a pewter mug and a lemon.",
];

const PLANT: &[&str] = &[
    "After a short summer shower, the macro lens moves close to {a} until single drops become visible.",
    "A gardener's path of worn bricks leads the eye towards {a}, framed by darker leaves.",
    "Against a pale and nearly white sky, the fine outline of {a} reads like an ink drawing.",
    "Looking up from the ground through blades of grass, the picture gives its whole height to {a}.",
    "In the corner of a walled garden, where the plaster is peeling, the season belongs to {a}.",
    "An early frost has drawn white borders around everything, and above all around {a}.",
    "A single insect hovers in front of {a}, frozen in mid-flight by a very short exposure.",
    "Behind the misted panes of a greenhouse one can make out {a} between rows of seedlings.",
    "From the far end of a quiet field, a long lens isolates {a} from everything around it.",
    "At the foot of a mossy wall, among fallen petals and snail shells, stands {a}.",
];

const PLACE: &[&str] = &[
    "From a fourth-floor balcony the camera looks down on {a}, with tiny figures crossing below.",
    "Shortly after the rain has stopped, puddles on the pavement mirror {a} upside down.",
    "A wide shot at street level takes in {a}, while a cyclist passes as a blur.",
    "Blue evening is settling over {a}, and the first windows have just begun to glow.",
    "On a Sunday morning without traffic, only pigeons share with the photographer the sight of {a}.",
    "Between two dark facades that frame the picture like curtains opens the view of {a}.",
    "High above the roofs a drone hovers over {a} and turns the scene into a pattern.",
    "Wet snow falls in thick flakes on {a}, muffling every sound for miles around.",
    "Drawn out by a long exposure, the lights of passing cars run like ribbons past {a}.",
    "Laundry, bicycles and pots of geraniums give a lived-in look to {a}.",
];

const ROOM: &[&str] = &[
    "A door stands ajar, and through the gap we look for the first time into {a}.",
    "Dust dances in a slanted beam of sun that crosses the whole length of {a}.",
    "Seen from one corner with a very wide lens, the picture reveals {a} in perfect order.",
    "Late at night, when everybody has gone home, a single bulb still lights {a}.",
    "Somebody has just left {a}, for a cup is still steaming and a chair is turned aside.",
    "Reflections in a tall mirror double the depth of {a} and hide the photographer.",
    "Rain runs down the panes outside, which makes {a} appear all the warmer.",
    "A cat sleeps on the sill and pays no attention to the quiet life of {a}.",
    "Symmetrical down to the last lamp, the composition presents {a} like a stage.",
    "Old photographs, worn floorboards and mended curtains tell the long story of {a}.",
];

const VIEW: &[&str] = &[
    "From the crest of a hill, after hours of walking, the view finally opens onto {a}.",
    "A tiny red tent in one corner gives the measure of the wide scene beyond, {a} under an open sky.",
    "In the last minutes before sunset, long shadows reach across {a} towards the camera.",
    "Low clouds drift past and hide, reveal and hide again {a} in the distance.",
    "Seen from the air, winding lines and soft patches of colour make an abstract picture of {a}.",
    "A lone walker with a stick has stopped in the foreground to take in {a}.",
    "Still water in front repeats {a} so exactly that up and down become uncertain.",
    "The first snow of the year has dusted {a}, and no footprint has broken it yet.",
    "Thunder is near, and a shaft of sun falls like a spotlight on {a}.",
    "Through the bent branches of an old tree one looks out on {a}, silent at this hour.",
];

const ANIMAL: &[&str] = &[
    "Caught in a rare calm moment, the picture meets {a} eye to eye at ground level.",
    "A very long lens picks out {a} from the tangle of leaves and shadows around.",
    "Morning mist still hangs over the water when the light first touches {a}.",
    "With one quick movement frozen forever, the photograph shows {a} against a clean background.",
    "From behind a curtain of tall grass, barely daring to breathe, we observe {a}.",
    "Backlit by a low sun, every hair and contour of {a} carries a thin golden line.",
    "Heavy rain is falling, and the patient photographer has found {a} making the best of it.",
    "In the soft green half-light of its home, the portrait presents {a} with great dignity.",
    "High up and far away from any path, a ledge of rock belongs to {a}.",
    "At the edge of a clearing, alert to the faintest noise, waits {a}.",
];

const PERSON: &[&str] = &[
    "With a calm and open look straight into the lens, the portrait introduces {a} in everyday surroundings.",
    "A half-length portrait shows {a} in front of a rough wall of flaking blue paint.",
    "Turned slightly away and lost in thought, the photographer has found {a} beside a tall window.",
    "Wind, laughter and an unguarded second give life to this picture of {a}.",
    "In tight framing from chin to brow, the camera studies the face of {a} with respect.",
    "Seen from the side against the evening sky, the figure of {a} becomes almost a silhouette.",
    "Surrounded by the tools of a long working life, the picture honours {a} without any pose.",
    "Across a crowded street, between passing coats, the lens holds on to {a}.",
    "A mirror in a dark wooden frame gives back the image of {a}, a little blurred at the rim.",
    "Taken on a doorstep after work, with tired eyes and a small smile, the picture is of {a}.",
];

const ACTION: &[&str] = &[
    "At the decisive moment, when everything hangs in the balance, the shutter stops {a} in mid-movement.",
    "Spectators at the edge melt into soft stripes of colour behind {a}, sharp and clear in the middle.",
    "From a position close to the ground, the camera follows {a} with complete concentration.",
    "Dust, breath and stray drops of water hang in the air around {a}.",
    "Seen from above, the lines and shadows of the place form a frame for {a}.",
    "Early in the day, long before anybody else is up, the picture finds {a}.",
    "A sequence of small gestures tells how much practice lies behind the ease of {a}.",
    "Over the shoulder of a curious onlooker, we watch {a} from only a few steps away.",
    "In the glow of a few bare bulbs, tired but cheerful, the scene gathers around {a}.",
    "A slow panning shot lets the background race past {a} in horizontal streaks.",
];

const FIGURE: &[&str] = &[
    "Without telling a whole story, the picture hints at one by showing {a} and little else.",
    "A photographer with patience has waited for the right instant and caught {a} in passing.",
    "Closely framed and almost abstract at first sight, the subject turns out to be {a}.",
    "Between a bright foreground and a dark background, the eye settles on {a}.",
    "Like a page from a diary, unposed and intimate, the image is of {a}.",
    "Seen through glass, with faint reflections laid over it, the scene contains {a}.",
    "The series about being human opens with this view of {a}.",
    "From an unusual height, slightly tilted, the lens discovers {a}.",
    "In grainy monochrome, with one stray highlight, the picture preserves {a}.",
    "Only after a moment does one make out, among shapes and shadows, {a}.",
];

const ARTWORK: &[&str] = &[
    "Hung at eye level on a white museum wall, the work is {a} in a narrow wooden frame.",
    "Traces of many patient hours are visible in {a}, reproduced here edge to edge.",
    "A detail from the lower half of {a} fills the picture, with every mark left by the hand.",
    "On the paint-spattered floor of a studio, still fresh, leans {a}.",
    "Raking light from the left brings out the surface of {a} down to its smallest ridge.",
    "The unknown maker of {a} has played with a bold contrast between crowded and empty areas.",
    "An open folder on a table of a print room shows {a} on heavy, slightly yellowed stock.",
    "Part tradition and part joke, this piece is {a} with a small surprise hidden in one corner.",
    "Viewed from two steps away, scattered strokes join and turn into {a}.",
    "The catalogue illustration presents {a} on neutral grey, carefully lit from both sides.",
];

const CARTOON: &[&str] = &[
    "On the first page of a picture book, with a great deal of sky above, we meet {a}.",
    "Drawn with round shapes and a thick friendly outline, the hero of this panel is {a}.",
    "A comic strip of a single frame shows {a} at the very moment when the plan goes wrong.",
    "Little hearts, stars and motion lines whirl through the air around {a}.",
    "Everybody in the tiny village has come out to marvel at {a} on the market square.",
    "Late in the evening, by the light of a paper moon, the story follows {a} home.",
    "With enormous eyes and a very small mouth, the character sheet presents {a} in a proud pose.",
    "The artist has placed {a} on top of a wobbly tower of cushions, quite unaware of the danger.",
    "In a forest of candy-coloured trees, a winding path belongs to {a}.",
    "An animated film seems to have been paused exactly when {a} looks at us and winks.",
];

const DESIGN: &[&str] = &[
    "A designer's desk seen from above shows {a} between a steel ruler and a stack of samples.",
    "Presented on a seamless pale background with a soft shadow, the draft is {a} in its final version.",
    "Clear lines and a strict grid give an air of calm to {a}.",
    "Three small variations stand beside the main proposal for {a}, each in another colour.",
    "Printed on thick uncoated paper, the sheet in this picture is {a} with crisp folded corners.",
    "The presentation board shows {a} at full size, with notes in pencil along the margin.",
    "Playful details that only show on a second look make the charm of {a}.",
    "Held up in front of a bright window, the translucent proof is {a} in two inks.",
    "An isometric view explains {a} piece by piece, as a patient teacher would.",
    "Rounded shapes, generous margins and one brave accent colour define {a}.",
];

const SHEET: &[&str] = &[
    "Designed to be read from across the hall, the layout is {a} with one dominant headline.",
    "Pinned to a cork board between older notices, one sheet stands out at once: {a}.",
    "Flat shapes overlap in the upper half of {a}, leaving a quiet field for the words.",
    "A strong diagonal divides {a} into a dark and a bright half.",
    "Seen straight on, without any frame, the picture is {a} from edge to edge.",
    "The modern take on {a} relies on a single large illustration and very few words.",
    "In the manner of letterpress prints from a century ago, the sheet is {a} in three inks.",
    "Thin rules and numbered fields give a tidy, almost scientific look to {a}.",
    "Projected onto a wide white screen in a darkened room, the audience sees {a}.",
    "Cut paper, visible grain and a hint of misprint lend warmth to {a}.",
];

const SCREEN: &[&str] = &[
    "On the display of a slim tablet that lies on a desk, the interface shows {a} in a light theme.",
    "A clean mock-up without any device around it presents {a} at a generous size.",
    "Rounded cards on a dark background organise {a} into three clear groups.",
    "A thumb hovers over the lower edge of a phone that displays {a}.",
    "The interface designer has reduced {a} to a few icons, a graph and one large button.",
    "Tilted slightly in space and casting a soft shadow, the panel shows {a} in detail.",
    "A bar on the left, a list in the middle and a preview on the right structure {a}.",
    "Mounted on a wall beside a door, a small touch screen runs {a}.",
    "Friendly line icons and plenty of white space make it easy to understand {a}.",
    "In a side-by-side comparison, the newer of two drafts of {a} takes up most of the picture.",
];

const SIGN: &[&str] = &[
    "Weathered by many winters but still easy to read, the picture centres on {a}.",
    "A passer-by has stopped, looked up and photographed {a} from slightly below.",
    "In close-up, with the rest of the scene dissolving into soft circles of light, we see {a}.",
    "Fresh paint still shines on {a}, and a brush lies forgotten nearby.",
    "Morning light falls at a flat angle across {a} and draws out every letter.",
    "Between ivy leaves and a rusty nail, somebody has long ago put up {a}.",
    "The straight-on view gives nearly all of the picture to {a}, without any distraction.",
    "Reflected in a puddle and once more in a window, the evening belongs to {a}.",
    "On a busy corner, while people hurry past as blurs, only one thing is sharp: {a}.",
    "Careful handwork shows in every stroke on {a}, down to the tiny flourishes.",
];

const QUOTED: &[&str] = &[
    "The words {q} stand in large, even letters and can be read without effort.",
    "Clearly legible in the centre, it says {q} in a confident hand.",
    "Across the upper third runs the line {q}, set in bold capitals.",
    "In slightly uneven lettering, the text {q} catches the eye at once.",
    "One line alone matters here, and it reads {q} in sharp contrast to the ground.",
    "The inscription {q} follows the curve of the shape with generous spacing.",
    "Big friendly characters spell out {q} right where one looks first.",
    "Just below the middle, neatly aligned, the reader finds {q}.",
];

const LIGHT: &[&str] = &[
    "Soft daylight from the left models the forms and leaves the far side in gentle shade.",
    "The last sun of the afternoon pours honey-coloured light over everything.",
    "An overcast sky spreads an even, silvery light without hard edges.",
    "Cool blue shadows meet one small patch of warm lamplight.",
    "Harsh noon light carves out deep, graphic shadows.",
    "A faint glow from behind separates the subject from the darkness.",
    "Candlelight flickers on the surfaces and deepens the browns and reds.",
    "Pale winter light comes in low and picks out every texture.",
    "Coloured reflections in teal and magenta play along the edges.",
    "Broken sunlight, filtered by leaves, scatters bright coins across the scene.",
    "Just after dawn the air is clear, and colours look freshly washed.",
    "A single spotlight leaves the corners in deep black.",
    "Diffuse white light makes the muted greens and greys feel almost weightless.",
    "Storm light, yellow under slate-grey clouds, gives the colours an unreal strength.",
    "Moonlight turns whites into pale blue and swallows most of the rest.",
    "Bounced light from a bright wall fills the shadows with a trace of pink.",
];

const FRAME: &[&str] = &[
    "The background falls away into a creamy blur, so that only the essential is sharp.",
    "Everything from the nearest grain to the horizon is in perfect focus.",
    "A generous empty area on one side gives the composition room to breathe.",
    "Leading lines run from the lower corners to the centre of interest.",
    "The frame is tight, slightly tilted, and cuts off everything that is not needed.",
    "Placed exactly in the middle, the subject gains an almost ceremonial calm.",
    "A square format and a restrained palette keep the picture simple.",
    "In the foreground, out of focus, a few dark shapes add depth.",
    "The panoramic format lets the eye travel slowly from left to right.",
    "Fine grain, as of fast film, lies over the whole picture.",
    "Repeated shapes in the background echo the main outline.",
    "The point of view, lower than one expects, changes familiar proportions.",
    "Off-centre framing and a clear diagonal bring quiet tension.",
    "Layer upon layer recedes into the distance, each a little paler than the last.",
    "A shallow plane of focus runs through the picture like a thin sheet of glass.",
    "Small imperfections have been left in on purpose and make it believable.",
];

const MOOD: &[&str] = &[
    "It feels like a memory from a long holiday.",
    "The mood is quiet, attentive and a little melancholy.",
    "One can nearly hear the silence.",
    "It has the honest look of documentary work.",
    "There is warmth in it, and a touch of humour.",
    "The whole could be a frame from a slow film.",
    "Nothing is staged, and nothing is missing.",
    "The effect is fresh, light and optimistic.",
    "It recalls hand-printed photographs of an earlier age.",
    "A sense of wonder runs through the scene.",
    "The result is sober, precise and modern.",
    "Time seems to have slowed down for a moment.",
];

const COLOUR: &[&str] = &[
    "The palette stays with ochre, brick red and a deep bottle green.",
    "Bright primary colours meet broad areas of untouched white.",
    "Soft pastels flow into one another without a hard edge.",
    "Only indigo and warm grey are used, in many shades.",
    "Glowing oranges stand against a nearly black blue.",
    "Faded tones suggest that the piece has hung in the sun for decades.",
    "Touches of gold flash up wherever the light strikes.",
    "Acid yellow and violet clash on purpose and give it energy.",
    "Earthy pigments and a chalky finish keep everything calm.",
    "Black, cream and one clear red are all the colours it needs.",
    "Thin glazes let lower layers shine through like stained glass.",
    "Candy pinks and mint greens set a cheerful tone.",
];

const HAND: &[&str] = &[
    "Loose, sure strokes describe the main shapes and leave the rest to the imagination.",
    "Fine hatching builds up the shadows line by line.",
    "The texture of the ground shows through everywhere and binds the parts together.",
    "Thick contours hold the shapes like the leads of a window.",
    "Patterns of dots, leaves and tiny waves fill the spaces in between.",
    "Wide margins surround the image and make it seem precious.",
    "A low horizon gives most of the surface to the sky.",
    "The composition spirals inward, and the eye follows gladly.",
    "Flat overlapping layers create depth without any perspective.",
    "A few deliberate splashes break the careful order.",
    "Small scenes in the background reward a longer look.",
    "Everything is slightly simplified, as if seen through half-closed eyes.",
];

const CHARM: &[&str] = &[
    "The whole has the charm of something made by hand.",
    "It is playful, generous and easy to love.",
    "A quiet dignity remains, whichever way one looks at it.",
    "Children would find new details every evening.",
    "It could hang in a small museum by the sea.",
    "The spirit is that of folk tales told by the fire.",
    "One senses the pleasure of its making.",
    "It is bold without being loud.",
    "There is rhythm in it, almost like music.",
    "The effect is dreamlike and gentle.",
];

const COLOUR_PLAN: &[&str] = &[
    "Deep navy and warm sand share the surface, with coral for the accents.",
    "White space dominates, and a single green marks what is important.",
    "A gradient from peach to violet fills the background without disturbing the text.",
    "Black lettering on bright yellow guarantees that nobody overlooks it.",
    "Muted blues and greys look sober, and an orange dot brings them to life.",
    "Cream paper, brown ink and a brick-red border recall old printed matter.",
    "High contrast between charcoal and mint keeps everything readable.",
    "Pale pink panels alternate with stripes of dark green.",
    "The colours are limited to two inks that mix where they overlap.",
    "A dark theme with soft turquoise lines rests the eyes.",
];

const GRID: &[&str] = &[
    "Columns of equal width keep pictures and words in order.",
    "A small illustration in the corner balances the heavy headline.",
    "Simple icons, all of one family, lead from one section to the next.",
    "Everything hangs from one strong line near the top.",
    "Rounded boxes with thin borders group what belongs together.",
    "Large numerals and short captions invite quick reading.",
    "The lower edge is kept free except for a fine pattern.",
    "Generous line spacing gives each element its own air.",
    "A circle in the middle draws all elements towards it.",
    "Subtle paper texture keeps the flat shapes from looking cold.",
];

const USE: &[&str] = &[
    "It looks professional and yet approachable.",
    "Even from far away the message is clear.",
    "The tone is friendly and free of clutter.",
    "The style borrows from the middle of the last century.",
    "One understands it within a second.",
    "The overall impression is calm, tidy and modern.",
    "A little wit keeps it from being dry.",
    "It seems ready to be printed.",
    "Nothing is there only for decoration.",
    "It has the energy of a good street market.",
];

/// What a shown text is put together from: one of each list, in this order.
pub(super) const FIRST_WORDS: [&str; 24] = [
    "Open", "Fresh", "Quiet", "Golden", "Grand", "Little", "Northern", "Open Air", "Old Town", "River", "Spring",
    "Summer", "Autumn", "Winter", "Morning", "Midnight", "Sunday", "Blue", "Silver", "Garden", "Harbour", "Mountain",
    "Corner", "Second",
];
/// The second.
pub(super) const SECOND_WORDS: [&str; 24] = [
    "Market", "Bakery", "Lights", "Letters", "Journey", "Kitchen", "Workshop", "Stories", "Festival", "Gallery",
    "Concert", "Library", "Harvest", "Evening", "Tea Room", "Express", "Gardens", "Opening", "Chapter", "Report",
    "Overview", "Lesson", "Welcome", "Street",
];
