"""Glow as scripts have it: the parts, names and formulas that accelerate() looks for, belonging to no package."""

import math

import torch
from torch import nn
from torch.nn import functional


class ActNorm(nn.Module):
    def __init__(self, in_channel, logdet=True):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, in_channel, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, in_channel, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))
        self.logdet = logdet

    def forward(self, input):
        if self.initialized.item() == 0:
            with torch.no_grad():
                self.loc.copy_(-input.mean((0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (input.std((0, 2, 3), keepdim=True) + 1e-6))
            self.initialized.fill_(1)
        out = self.scale * (input + self.loc)
        log_det = input.shape[2] * input.shape[3] * self.scale.abs().log().sum()
        return (out, log_det) if self.logdet else out

    def reverse(self, output):
        return output / self.scale - self.loc


class InvConv2d(nn.Module):
    def __init__(self, in_channel):
        super().__init__()
        q = torch.linalg.qr(torch.randn(in_channel, in_channel))[0]
        self.weight = nn.Parameter(q[:, :, None, None].clone())

    def forward(self, input):
        log_det = torch.linalg.slogdet(self.weight.squeeze().double())[1].float()
        return functional.conv2d(input, self.weight), input.shape[2] * input.shape[3] * log_det

    def reverse(self, output):
        return functional.conv2d(output, self.weight.squeeze().inverse()[:, :, None, None])


class InvConv2dLU(nn.Module):
    def __init__(self, in_channel):
        super().__init__()
        q = torch.linalg.qr(torch.randn(in_channel, in_channel))[0]
        p, lower, upper = torch.linalg.lu(q)
        ones, diagonal = torch.ones_like(q), upper.diagonal()
        self.register_buffer("w_p", p)
        self.register_buffer("u_mask", ones.triu(1))
        self.register_buffer("l_mask", ones.tril(-1))
        self.register_buffer("s_sign", diagonal.sign())
        self.register_buffer("l_eye", torch.eye(in_channel))
        self.w_l = nn.Parameter(lower)
        self.w_s = nn.Parameter(diagonal.abs().log())
        self.w_u = nn.Parameter(upper.triu(1))

    def matrix(self):
        lower = self.w_l * self.l_mask + self.l_eye
        upper = self.w_u * self.u_mask + torch.diag(self.s_sign * self.w_s.exp())
        return self.w_p @ lower @ upper

    def forward(self, input):
        out = functional.conv2d(input, self.matrix()[:, :, None, None])
        return out, input.shape[2] * input.shape[3] * self.w_s.sum()

    def reverse(self, output):
        return functional.conv2d(output, self.matrix().inverse()[:, :, None, None])


class ZeroConv2d(nn.Module):
    def __init__(self, in_channel, out_channel):
        super().__init__()
        self.conv = nn.Conv2d(in_channel, out_channel, 3, padding=0)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.scale = nn.Parameter(torch.zeros(1, out_channel, 1, 1))

    def forward(self, input):
        return self.conv(functional.pad(input, [1, 1, 1, 1], value=1)) * torch.exp(self.scale * 3)


class AffineCoupling(nn.Module):
    def __init__(self, in_channel, filter_size=16, affine=True):
        super().__init__()
        self.affine = affine
        self.net = nn.Sequential(
            nn.Conv2d(in_channel // 2, filter_size, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(filter_size, filter_size, 1),
            nn.ReLU(inplace=True),
            ZeroConv2d(filter_size, in_channel if affine else in_channel // 2),
        )

    def forward(self, input):
        passes, moved = input.chunk(2, 1)
        if not self.affine:
            return torch.cat([passes, moved + self.net(passes)], 1), None
        log_s, t = self.net(passes).chunk(2, 1)
        s = torch.sigmoid(log_s + 2)
        return torch.cat([passes, (moved + t) * s], 1), s.log().flatten(1).sum(1)

    def reverse(self, output):
        passes, moved = output.chunk(2, 1)
        if not self.affine:
            return torch.cat([passes, moved - self.net(passes)], 1)
        log_s, t = self.net(passes).chunk(2, 1)
        return torch.cat([passes, moved / torch.sigmoid(log_s + 2) - t], 1)


class Flow(nn.Module):
    def __init__(self, in_channel, affine=True, conv_lu=True):
        super().__init__()
        self.actnorm = ActNorm(in_channel)
        self.invconv = InvConv2dLU(in_channel) if conv_lu else InvConv2d(in_channel)
        self.coupling = AffineCoupling(in_channel, affine=affine)

    def forward(self, input):
        log_det = 0
        for part in (self.actnorm, self.invconv, self.coupling):
            input, more = part(input)
            log_det = log_det if more is None else log_det + more
        return input, log_det

    def reverse(self, output):
        for part in (self.coupling, self.invconv, self.actnorm):
            output = part.reverse(output)
        return output


class Block(nn.Module):
    def __init__(self, in_channel, n_flow, split=True, affine=True, conv_lu=True):
        super().__init__()
        self.flows = nn.ModuleList(Flow(4 * in_channel, affine, conv_lu) for _ in range(n_flow))
        self.split = split
        width = in_channel * (2 if split else 4)
        self.prior = ZeroConv2d(width, 2 * width)

    def forward(self, input):
        out, log_det = functional.pixel_unshuffle(input, 2), 0
        for flow in self.flows:
            out, more = flow(out)
            log_det = log_det + more
        out, new = out.chunk(2, 1) if self.split else (out, out)
        mean, log_sd = self.prior(out if self.split else torch.zeros_like(out)).chunk(2, 1)
        log_p = -0.5 * math.log(2 * math.pi) - log_sd - 0.5 * ((new - mean) / log_sd.exp()) ** 2
        return out, log_det, log_p.flatten(1).sum(1), new

    def reverse(self, output, eps=None, reconstruct=False):
        new = eps
        if not reconstruct:
            given = output if self.split else torch.zeros_like(output)
            mean, log_sd = self.prior(given).chunk(2, 1)
            new = mean + log_sd.exp() * eps
        out = torch.cat([output, new], 1) if self.split else new
        for flow in reversed(self.flows):
            out = flow.reverse(out)
        return functional.pixel_shuffle(out, 2)


class Glow(nn.Module):
    def __init__(self, in_channel, n_flow, n_block, affine=True, conv_lu=True):
        super().__init__()
        options = {"affine": affine, "conv_lu": conv_lu}
        self.blocks = nn.ModuleList(
            Block(in_channel * 2**i, n_flow, split=i < n_block - 1, **options)
            for i in range(n_block)
        )

    def forward(self, input):
        log_p, log_det, latents = 0, 0, []
        for block in self.blocks:
            input, more, of_block, new = block(input)
            latents.append(new)
            log_p, log_det = log_p + of_block, log_det + more
        return log_p, log_det, latents

    def reverse(self, latents, reconstruct=False):
        out = latents[-1]
        for block, new in zip(reversed(self.blocks), reversed(latents), strict=True):
            out = block.reverse(out, new, reconstruct=reconstruct)
        return out
