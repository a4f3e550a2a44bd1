//! Sentences that are put together, for both languages: light for photographs, colours for all else.

use crate::data::dice::Dice;

/// A sentence with places `{0}`, `{1}`, … and what may stand there.
pub(super) struct Parts {
    frame: &'static str,
    lists: &'static [&'static [&'static str]],
}

impl Parts {
    /// A sentence.
    pub(super) fn draw(&self, dice: &mut Dice) -> String {
        let places = self.lists.iter().enumerate();
        places.fold(self.frame.to_owned(), |text, (place, list)| {
            text.replace(&format!("{{{place}}}"), dice.pick(list))
        })
    }
}

/// A sentence on light, put together: when, what light, from where, and what it does.
pub(super) const ENGLISH_LIGHT: Parts = Parts {
    frame: "{0}, {1} comes in {2} and {3}.",
    lists: &[
        &[
            "Before sunrise",
            "At noon",
            "Late in the day",
            "After the rain",
            "In deep winter",
            "On a hazy morning",
            "At the blue hour",
            "Under a full moon",
            "In early spring",
            "Just before a storm",
            "On a still evening",
            "In the heat of August",
        ],
        &[
            "pale light",
            "amber light",
            "a cold glow",
            "a thin beam",
            "filtered light",
            "a warm shimmer",
            "pearly light",
            "a hard ray",
            "greenish light",
            "a rosy haze",
        ],
        &[
            "from the left",
            "from the right",
            "from behind",
            "from above",
            "through a gap",
            "along the ground",
            "over the far edge",
            "from a distant window",
        ],
        &[
            "draws long shadows",
            "softens every edge",
            "brings out fine textures",
            "leaves half of the scene dark",
            "sets small highlights",
            "warms the darker tones",
            "flattens the distance",
            "makes the dust visible",
            "turns surfaces to velvet",
            "splits the picture in two",
        ],
    ],
};

/// A sentence on colours, put together.
pub(super) const ENGLISH_COLOURS: Parts = Parts {
    frame: "The colours lead from {0} over {1} to {2}, with {3}.",
    lists: &[
        &[
            "ivory",
            "slate",
            "deep teal",
            "ochre",
            "soft grey",
            "plum",
            "midnight blue",
            "straw yellow",
            "rust",
            "sea green",
        ],
        &[
            "sage",
            "brick",
            "powder blue",
            "sand",
            "violet",
            "moss",
            "copper",
            "mint",
            "charcoal",
            "rose",
        ],
        &[
            "near black",
            "bright white",
            "burgundy",
            "turquoise",
            "lemon",
            "umber",
            "lilac",
            "navy",
            "coral",
            "olive",
        ],
        &[
            "a single red accent",
            "thin white lines",
            "specks of gold",
            "a pale border",
            "dark outlines",
            "a glowing centre",
            "a fine grain",
            "small dots of green",
            "soft transitions",
            "one sharp edge",
        ],
    ],
};

/// A sentence on light, put together: when, what light, from where, and what it does.
pub(super) const CHINESE_LIGHT: Parts = Parts {
    frame: "{0}，{1}{2}，{3}。",
    lists: &[
        &[
            "日出之前",
            "正午时分",
            "临近黄昏",
            "雨过之后",
            "深冬时节",
            "薄雾清晨",
            "暮色初临",
            "满月之夜",
            "初春时节",
            "雷雨将至",
            "无风的傍晚",
            "盛夏午后",
        ],
        &[
            "淡白的光",
            "琥珀色的光",
            "清冷的微光",
            "细细一束光",
            "滤过的柔光",
            "温暖的亮光",
            "珍珠般的光",
            "锐利的光线",
            "泛绿的光",
            "玫瑰色的光",
        ],
        &[
            "自左侧照来",
            "自右侧斜入",
            "从背后透出",
            "由上方洒下",
            "穿过缝隙而入",
            "贴着地面铺开",
            "越过远处的边缘",
            "来自远处的窗口",
        ],
        &[
            "拖出长长的影子",
            "柔化了所有边缘",
            "显出细微的质感",
            "让一半景物隐入暗处",
            "点出几处小小的高光",
            "温暖了深沉的色调",
            "压平了远近的距离",
            "照见了空中的浮尘",
            "使表面如同丝绒",
            "把画面分成明暗两半",
        ],
    ],
};

/// A sentence on colours, put together.
pub(super) const CHINESE_COLOURS: Parts = Parts {
    frame: "色彩由{0}经{1}过渡到{2}，并以{3}。",
    lists: &[
        &[
            "象牙白",
            "石板灰",
            "深青",
            "赭黄",
            "浅灰",
            "梅紫",
            "午夜蓝",
            "麦秆黄",
            "铁锈红",
            "海绿",
        ],
        &[
            "灰绿",
            "砖红",
            "粉蓝",
            "沙色",
            "堇紫",
            "苔绿",
            "古铜",
            "薄荷绿",
            "炭灰",
            "蔷薇粉",
        ],
        &[
            "近黑",
            "亮白",
            "酒红",
            "绿松石色",
            "柠檬黄",
            "焦茶",
            "丁香紫",
            "藏青",
            "珊瑚红",
            "橄榄绿",
        ],
        &[
            "一点正红提神",
            "纤细白线勾边",
            "细碎金点装饰",
            "浅色边框收束",
            "深色轮廓压住",
            "发亮的中心点题",
            "细密颗粒统一",
            "零星绿点呼应",
            "柔和渐变衔接",
            "一道利落的边界收尾",
        ],
    ],
};
